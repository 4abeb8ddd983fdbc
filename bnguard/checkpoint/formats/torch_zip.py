"""torch's zip files, as ``torch.save`` has written them since version 1.6, and TorchScript's.

A checkpoint is not loaded and saved again. The archive is copied byte for byte, the pickle
included; only the storages of the statistics, and their checksums, are replaced where they are.
The provenance note is appended as a record of its own.
"""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from bnguard.checkpoint.formats import LONGEST_PROVENANCE_BYTES, OpenCheckpoint, parse_provenance
from bnguard.checkpoint.storage import OpenFiles, Patch, Source, Storage, StoredTensor
from bnguard.checkpoint.unpickling import read_pickle
from bnguard.errors import CheckpointError, printable

_LOCAL_MAGIC = b"PK\x03\x04"
_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_LOCAL_HEADER_BYTES = 30
_DIRECTORY_ENTRY_BYTES = 46
_CRC_IN_LOCAL_HEADER = 14
_CRC_IN_DIRECTORY_ENTRY = 16
_HAS_DESCRIPTOR = 0x0008
_IS_ENCRYPTED = 0x0001
_MALFORMED = (BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error)
_PICKLE = "data.pkl"
_PROVENANCE = "bnguard/provenance.json"
# What torch keeps for itself: nothing that a user saved.
_BOOKKEEPING = frozenset(
    {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
)


@dataclass(frozen=True, eq=False)
class Archive:
    """A zip archive of torch, as its directory describes it.

    Attributes:
        source: The bytes of the archive.
        entries: Its files, in the order of the directory.
        directory_start: Position of the directory.
    """

    source: Source
    entries: tuple[ZipInfo, ...]
    directory_start: int

    @classmethod
    def read(cls, source: Source) -> Archive:
        """Read the directory of an archive."""
        try:
            with ZipFile(source.stream()) as archive:
                return cls(source, tuple(archive.infolist()), archive.start_dir)
        except _MALFORMED as error:
            raise source.truncated() from error

    @cached_property
    def records(self) -> dict[str, ZipInfo]:
        """The files by name; of several with one name the last."""
        return {entry.filename: entry for entry in self.entries}

    @cached_property
    def folder(self) -> str:
        """The folder that holds all records, with its slash."""
        pickles = [name for name in self.records if name.endswith("/" + _PICKLE)]
        if not pickles:
            raise CheckpointError(
                f"{self.source.path}: an archive without a pickle of torch; "
                "use a file that torch.save wrote"
            )
        return min(pickles, key=len).removesuffix(_PICKLE)

    def content(self, record: ZipInfo) -> Source:
        """Return the content of a record."""
        if not _is_stored(record):
            raise CheckpointError(
                f"{self.source.path}: its record {printable(record.filename[:80])} is compressed "
                "or encrypted, which torch never does; save the checkpoint again with torch.save"
            )
        header = self.source.read(record.header_offset, _LOCAL_HEADER_BYTES)
        if not header.startswith(_LOCAL_MAGIC):
            raise self.source.truncated()
        name_and_extra = sum(struct.unpack_from("<HH", header, _LOCAL_HEADER_BYTES - 4))
        start = record.header_offset + _LOCAL_HEADER_BYTES + name_and_extra
        return self.source.window(start, record.file_size)

    def read_object(self) -> object:
        """Return what was saved."""
        byteorder = self.records.get(self.folder + "byteorder")
        is_big = byteorder is not None and byteorder.file_size == len("big")
        known: dict[str, Storage] = {}

        def find_storage(name: str, nbytes: int) -> Storage:
            if name not in known:
                record = self.records.get(f"{self.folder}data/{name}")
                if record is None:
                    raise ValueError(f"storage {name} is missing")
                known[name] = self.storage(record, "big" if is_big else "little")
            return known[name]

        source = self.content(self.records[self.folder + _PICKLE])
        return read_pickle(source, source.stream(), find_storage)

    def storage(self, record: ZipInfo, byteorder: str = "little") -> Storage:
        """Return the content of a record as a storage; its header is read when it is needed."""
        return Storage(record.file_size, byteorder, lambda: self.content(record))

    def checksum_patches(self, patches: Sequence[Patch]) -> Iterator[Patch]:
        """Yield patches for the CRC-32 of every record whose content the given patches change."""
        source = self.source
        positions = sorted(patch.position for patch in patches)
        entry_start = self.directory_start
        for record in self.entries:
            entry = source.read(entry_start, _DIRECTORY_ENTRY_BYTES)
            in_directory = source.start + entry_start + _CRC_IN_DIRECTORY_ENTRY
            entry_start += _DIRECTORY_ENTRY_BYTES + sum(struct.unpack_from("<HHH", entry, 28))
            if not _is_stored(record):
                continue
            content = self.content(record)
            end = content.start + content.size
            if bisect_left(positions, content.start) == bisect_left(positions, end):
                continue
            crc = 0
            for chunk in content.patched(patches):
                crc = zlib.crc32(chunk, crc)
            in_record = source.start + record.header_offset + _CRC_IN_LOCAL_HEADER
            if record.flag_bits & _HAS_DESCRIPTOR:
                has_magic = source.read(end - source.start, 4) == _DESCRIPTOR_MAGIC
                in_record = end + len(_DESCRIPTOR_MAGIC) * has_magic
            for position in (in_directory, in_record):
                yield Patch(source.path, position, struct.pack("<I", crc))


def _is_stored(record: ZipInfo) -> bool:
    """Return whether a record is neither compressed nor encrypted."""
    is_plain = record.compress_type == ZIP_STORED and not record.flag_bits & _IS_ENCRYPTED
    return is_plain and record.compress_size == record.file_size


class TorchZip(OpenCheckpoint):
    """``torch.save`` since 1.6, Lightning's ``.ckpt``, and TorchScript."""

    format = "torch zip"
    endings = (".ckpt", ".pt", ".pth", ".pth.tar", ".bin")

    def __init__(self, path: Path, files: OpenFiles) -> None:
        super().__init__(path, files)
        self._archive = Archive.read(self.open_file(path))
        self.root = self._archive.read_object()
        self.extras = dict(self._extras())
        note = self._archive.records.get(self._archive.folder + _PROVENANCE)
        if note is not None:
            content = self._archive.content(note)
            text = content.read(0, min(content.size, LONGEST_PROVENANCE_BYTES))
            self.provenance = parse_provenance(text)

    @classmethod
    def recognises(cls, path: Path, start: bytes) -> bool:
        """Return whether a file begins as an archive does."""
        return start.startswith(_LOCAL_MAGIC)

    def copy(self, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the archive byte for byte, and append the note to it."""
        archive = self._archive
        last = max(record.header_offset for record in archive.records.values())
        if last > archive.directory_start:
            raise CheckpointError(
                f"{self.path}: its archive has records behind its directory; "
                "save the checkpoint again with torch.save"
            )
        changes = [*patches, *archive.checksum_patches(patches)]
        with target.open("wb") as handle:
            handle.writelines(archive.source.patched(changes))
        name = archive.folder + _PROVENANCE
        with ZipFile(target, "a") as copy:
            old_note = copy.NameToInfo.pop(name, None)
            if old_note is not None:
                copy.filelist.remove(old_note)
                if old_note.header_offset == last:
                    copy.start_dir = last
            copy.writestr(ZipInfo(name), provenance)

    def _extras(self) -> Iterator[tuple[str, StoredTensor]]:
        for name, record in self._archive.records.items():
            short = name.removeprefix(self._archive.folder)
            is_known = short in (*_BOOKKEEPING, _PICKLE, _PROVENANCE) or short.startswith("data/")
            if not is_known and _is_stored(record):
                storage = self._archive.storage(record)
                yield f"record {short}", StoredTensor.viewing(storage, "uint8", (storage.nbytes,))
