"""torch's files before version 1.6: a few pickles, then the storages one behind the other.

``torch.save(..., _use_new_zipfile_serialization=False)`` still writes them. They have no
checksums. torch ignores what follows the last storage, and the provenance note is kept there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bnguard.checkpoint.formats import LONGEST_PROVENANCE_BYTES, OpenCheckpoint, parse_provenance
from bnguard.checkpoint.storage import OpenFiles, Patch, Source, Storage
from bnguard.checkpoint.unpickling import damaged, read_pickle

# The number at the beginning of each file, as a pickle writes it: LONG1, ten bytes, STOP.
_MAGIC = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."
# Before each storage is the number of its elements, which its pickle has said already.
_COUNT_BYTES = 8
_NOTE_MAGIC = b"\nbnguard-provenance "


class TorchLegacy(OpenCheckpoint):
    """``torch.save`` before 1.6."""

    format = "torch legacy"

    def __init__(self, path: Path, files: OpenFiles) -> None:
        super().__init__(path, files)
        source = self.open_file(path)
        storages: dict[str, Storage] = {}
        # Where the storages are is known once all pickles are read.
        places: dict[str, Source] = {}

        def find_storage(name: str, nbytes: int) -> Storage:
            return storages.setdefault(name, Storage(nbytes, "little", lambda: places[name]))

        stream = source.stream()
        for _ in ("magic number", "version", "sizes of types"):
            read_pickle(source, stream)
        self.root = read_pickle(source, stream, find_storage)
        names = read_pickle(source, stream)
        if not isinstance(names, list) or set(map(str, names)) != set(storages):
            raise damaged(path, "the list of its storages is wrong")
        end = stream.tell()
        for name in map(str, names):
            start = end + _COUNT_BYTES
            places[name] = source.window(start, storages[name].nbytes)
            end = start + storages[name].nbytes
        self._content = source.window(0, end)
        if source.size - end <= LONGEST_PROVENANCE_BYTES:
            tail = source.read(end, source.size - end)
            if tail.startswith(_NOTE_MAGIC):
                self.provenance = parse_provenance(tail.removeprefix(_NOTE_MAGIC))

    @classmethod
    def recognises(cls, path: Path, start: bytes) -> bool:
        """Return whether a file begins with the pickle of torch's magic number."""
        return _MAGIC in start[:32]

    def copy(self, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the file byte for byte, and append the note to it."""
        with target.open("wb") as handle:
            handle.writelines(self._content.patched(patches))
            handle.write(_NOTE_MAGIC + provenance.encode())
