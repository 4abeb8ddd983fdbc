"""torch's files before version 1.6: a few pickles, then the storages one behind the other.

``torch.save(..., _use_new_zipfile_serialization=False)`` still writes them. They have no
checksums, so that storages are replaced where they lie. torch reads nothing behind the last
storage, and the note of how a file came about stands there.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bnguard.checkpoint.contents import LONGEST_PROVENANCE_BYTES, Contents, parse_provenance
from bnguard.checkpoint.files import Patch, Source, first_bytes, open_source, patched, write_all
from bnguard.checkpoint.formats.base import Format
from bnguard.checkpoint.stored_tensors import Storage, carrier
from bnguard.checkpoint.unpickling import TypedStorage, damaged, read_pickle, storage_dtype

# The number that each of these files begins with, as a pickle writes it: LONG1, ten bytes, STOP.
_MAGIC = b"\x8a\x0a" + 0x1950A86A20F9469CFC6C.to_bytes(10, "little") + b"."
_MAGIC_WITHIN_BYTES = 32
_COUNT = struct.Struct("<q")
_NOTE_MAGIC = b"\nbnguard-provenance "


@dataclass(frozen=True, eq=False)
class _LegacyStorage(Storage):
    """A storage whose place is known once the pickles before all storages are read."""

    name: str
    places: Mapping[str, Source]

    @property
    def source(self) -> Source:
        return self.places[self.name]


@dataclass(frozen=True, eq=False)
class _LegacyFile:
    """What a file holds.

    Attributes:
        root: The object that was saved.
        end: Where the last storage ends.
    """

    root: object
    end: int


class TorchLegacy(Format):
    """``torch.save`` before 1.6."""

    name = "torch legacy"

    def recognises(self, path: Path) -> bool:
        """Whether the file begins with the pickle of torch's magic number."""
        return _MAGIC in first_bytes(path, _MAGIC_WITHIN_BYTES)

    @contextmanager
    def open(self, path: Path) -> Iterator[Contents]:
        """Open a file of this format."""
        with open_source(path) as source:
            file = _read(source)
            yield Contents(
                path=path,
                format=self.name,
                root=file.root,
                provenance=_provenance(source, file.end),
            )

    def copy(self, path: Path, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the file byte for byte, and append the note to it."""
        with open_source(path) as source, target.open("wb") as handle:
            write_all(handle, patched(source.window(0, _read(source).end), patches))
            handle.write(_NOTE_MAGIC + provenance.encode())


def _read(source: Source) -> _LegacyFile:
    storages: dict[str, _LegacyStorage] = {}
    places: dict[str, Source] = {}
    stream = source.stream()
    for _ in ("magic number", "version", "sizes of types"):
        read_pickle(source, stream, _no_storage)
    root = read_pickle(source, stream, _storages(storages, places))
    names = read_pickle(source, stream, _no_storage)
    listed = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    if set(listed) != set(storages):
        raise damaged(source.path, "the list of its storages is wrong")
    position = stream.tell()
    for name in listed:
        # Each storage is preceded by the number of its elements, which its pickle said already.
        start = position + _COUNT.size
        places[name] = source.window(start, storages[name].nbytes)
        position = start + storages[name].nbytes
    return _LegacyFile(root, position)


def _storages(
    storages: dict[str, _LegacyStorage], places: Mapping[str, Source]
) -> Callable[[tuple[object, ...]], object]:
    def resolve(identifier: tuple[object, ...]) -> object:
        if identifier[0] == "module":
            return identifier[1]  # the class of a module that was saved with its source code
        kind, storage_type, name, _, count, view = identifier
        if kind != "storage" or not isinstance(name, str) or view is not None:
            raise ValueError("a persistent identifier that is no storage")
        if not isinstance(count, int) or count < 0:
            raise ValueError("a storage without a size")
        dtype = storage_dtype(storage_type)
        if name not in storages:
            itemsize = carrier(dtype or "uint8").itemsize
            storages[name] = _LegacyStorage(count * itemsize, "little", name, places)
        return TypedStorage(storages[name], dtype)

    return resolve


def _no_storage(identifier: tuple[object, ...]) -> object:
    raise ValueError("a storage where there can be none")


def _provenance(source: Source, end: int) -> Mapping[str, object] | None:
    if source.size - end > LONGEST_PROVENANCE_BYTES:
        return None
    tail = source.read(end, source.size - end)
    is_note = tail.startswith(_NOTE_MAGIC)
    return parse_provenance(tail.removeprefix(_NOTE_MAGIC)) if is_note else None
