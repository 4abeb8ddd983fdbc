"""torch's zip files, as ``torch.save`` has written them since version 1.6, and TorchScript's.

A checkpoint is not loaded and saved again. The archive is copied byte for byte, the pickle
included; only the storages of the statistics, and their checksums, are replaced where they lie.
The note of how it came about is appended as a record of its own.
"""

from __future__ import annotations

import io
import struct
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from bnguard.checkpoint.contents import LONGEST_PROVENANCE_BYTES, Contents, parse_provenance
from bnguard.checkpoint.files import (
    Patch,
    Source,
    first_bytes,
    open_source,
    patched,
    write_all,
)
from bnguard.checkpoint.formats.base import Format
from bnguard.checkpoint.stored_tensors import Storage, StoredTensor
from bnguard.checkpoint.unpickling import TypedStorage, read_pickle, storage_dtype
from bnguard.errors import CheckpointError, printable

LOCAL_MAGIC = b"PK\x03\x04"
_DESCRIPTOR_MAGIC = b"PK\x07\x08"
_LOCAL_HEADER_BYTES = 30
_DIRECTORY_ENTRY_BYTES = 46
_CRC_IN_LOCAL_HEADER = 14
_CRC_IN_DIRECTORY_ENTRY = 16
_HAS_DESCRIPTOR = 0x0008
_IS_ENCRYPTED = 0x0001
# About a million records.
_LARGEST_DIRECTORY_BYTES = 2**26
_MALFORMED = (BadZipFile, NotImplementedError, OverflowError, ValueError, struct.error)
_PICKLE = "data.pkl"
_PROVENANCE = "bnguard/provenance.json"
# What torch keeps for itself: nothing that a user saved.
_BOOKKEEPING = frozenset(
    {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
)


@dataclass(frozen=True, eq=False)
class Archive:
    """A zip archive whose directory has been read.

    Attributes:
        source: The bytes of the archive.
        entries: Its files, in the order of the directory.
        directory_start: Position of the directory.
    """

    source: Source
    entries: tuple[ZipInfo, ...]
    directory_start: int

    @cached_property
    def records(self) -> dict[str, ZipInfo]:
        """The files by name; of several with one name the last."""
        return {entry.filename: entry for entry in self.entries}

    def content(self, record: ZipInfo) -> Source:
        """Return the content of a record.

        Raises:
            CheckpointError: It is compressed or encrypted, or its header is damaged.
        """
        if not is_stored(record):
            raise CheckpointError(
                f"{self.source.path}: its record {printable(record.filename[:80])} is compressed "
                "or encrypted, which torch never does; save the checkpoint again with torch.save"
            )
        header = self.source.read(record.header_offset, _LOCAL_HEADER_BYTES)
        if not header.startswith(LOCAL_MAGIC):
            raise self.source.truncated()
        name_and_extra = sum(struct.unpack_from("<HH", header, _LOCAL_HEADER_BYTES - 4))
        start = record.header_offset + _LOCAL_HEADER_BYTES + name_and_extra
        return self.source.window(start, record.file_size)


def read_archive(source: Source) -> Archive:
    """Read the directory of an archive.

    Raises:
        CheckpointError: It has none, or it is damaged.
    """
    try:
        with ZipFile(_SmallReads(source.raw_stream())) as archive:
            return Archive(source, tuple(archive.infolist()), archive.start_dir)
    except _MALFORMED as error:
        raise source.truncated() from error


class _SmallReads(io.BufferedReader):
    """Bytes of an archive, of which nobody reads more at once than a directory may have.

    ``zipfile`` believes the size that a file gives for its directory.
    """

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_DIRECTORY_BYTES:
            raise BadZipFile("a directory of more records than bnguard reads")
        return super().read(size)


def is_stored(record: ZipInfo) -> bool:
    """Return whether a record is neither compressed nor encrypted."""
    is_plain = record.compress_type == ZIP_STORED and not record.flag_bits & _IS_ENCRYPTED
    return is_plain and record.compress_size == record.file_size


def checksum_patches(archive: Archive, patches: Sequence[Patch]) -> Iterator[Patch]:
    """Yield patches for the CRC-32 of every record whose content the given patches change.

    Raises:
        CheckpointError: A record cannot be read.
    """
    source = archive.source
    changed = _changed_records(archive, patches)
    for record, entry in _directory_entries(archive) if changed else ():
        if record.filename not in changed:
            continue
        content = archive.content(record)
        crc = 0
        for chunk in patched(content, patches):
            crc = zlib.crc32(chunk, crc)
        places = (
            source.start + entry + _CRC_IN_DIRECTORY_ENTRY,
            _checksum_position(archive, record, content),
        )
        for place in places:
            yield Patch(source.path, place, struct.pack("<I", crc))


def _changed_records(archive: Archive, patches: Sequence[Patch]) -> set[str]:
    records = sorted(archive.entries, key=lambda record: record.header_offset)
    headers = [archive.source.start + record.header_offset for record in records]
    first, stop = archive.source.start, archive.source.start + archive.source.size
    inside = [patch.position for patch in patches if first <= patch.position < stop]
    return {records[bisect_left(headers, position) - 1].filename for position in inside}


def _directory_entries(archive: Archive) -> Iterator[tuple[ZipInfo, int]]:
    """Yield each record with the position of its entry in the directory."""
    position = archive.directory_start
    for record in archive.entries:
        yield record, position
        entry = archive.source.read(position, _DIRECTORY_ENTRY_BYTES)
        position += _DIRECTORY_ENTRY_BYTES + sum(struct.unpack_from("<HHH", entry, 28))


def _checksum_position(archive: Archive, record: ZipInfo, content: Source) -> int:
    """Return where in the file the checksum next to the content of a record is."""
    source = archive.source
    if not record.flag_bits & _HAS_DESCRIPTOR:
        return source.start + record.header_offset + _CRC_IN_LOCAL_HEADER
    end = content.start + content.size
    has_magic = source.read(end - source.start, 4) == _DESCRIPTOR_MAGIC
    return end + len(_DESCRIPTOR_MAGIC) * has_magic


@dataclass(frozen=True, eq=False)
class RecordStorage(Storage):
    """A storage that is a record of an archive."""

    archive: Archive
    record: ZipInfo

    @property
    def source(self) -> Source:
        """Where the bytes lie; told by the header of the record, which is read when asked for."""
        return self.archive.content(self.record)


class TorchZip(Format):
    """``torch.save`` since 1.6, Lightning's ``.ckpt``, and TorchScript."""

    name = "torch zip"

    def recognises(self, path: Path) -> bool:
        """Whether the file begins as an archive does."""
        return first_bytes(path, 4) == LOCAL_MAGIC

    @contextmanager
    def open(self, path: Path) -> Iterator[Contents]:
        """Open a file of this format."""
        with open_source(path) as source:
            archive = read_archive(source)
            folder = archive_folder(archive)
            yield Contents(
                path=path,
                format=self.name,
                root=read_object(archive, folder),
                extras=dict(_extras(archive, folder)),
                provenance=_provenance(archive, folder),
            )

    def copy(self, path: Path, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the archive byte for byte, and append the note to it."""
        with open_source(path) as source, target.open("wb") as handle:
            archive = read_archive(source)
            last = max(record.header_offset for record in archive.records.values())
            if last > archive.directory_start:
                raise CheckpointError(
                    f"{path}: its archive has records behind its directory; "
                    "save the checkpoint again with torch.save"
                )
            name = archive_folder(archive) + _PROVENANCE
            write_all(handle, patched(source, [*patches, *checksum_patches(archive, patches)]))
        with ZipFile(target, "a") as copy:
            old_note = copy.NameToInfo.pop(name, None)
            if old_note is not None:
                copy.filelist.remove(old_note)
                if old_note.header_offset == last:
                    copy.start_dir = last
            copy.writestr(ZipInfo(name), provenance)


def read_object(archive: Archive, folder: str) -> object:
    """Return what was saved in an archive whose records lie in ``folder``.

    Raises:
        CheckpointError: It is damaged.
    """
    source = archive.content(archive.records[folder + _PICKLE])
    return read_pickle(source, source.stream(), _storages(archive, folder))


def _storages(archive: Archive, folder: str) -> Callable[[tuple[object, ...]], TypedStorage]:
    known: dict[str, Storage] = {}
    order = _byteorder(archive, folder)

    def resolve(identifier: tuple[object, ...]) -> TypedStorage:
        kind, storage_type, name = identifier[:3]
        if kind != "storage" or not isinstance(name, str):
            raise ValueError("a persistent identifier that is no storage")
        if name not in known:
            record = archive.records.get(f"{folder}data/{name}")
            if record is None:
                raise ValueError(f"storage {name} is missing")
            known[name] = RecordStorage(record.file_size, order, archive, record)
        return TypedStorage(known[name], storage_dtype(storage_type))

    return resolve


def archive_folder(archive: Archive) -> str:
    """Return the folder that holds all records, with its slash.

    Raises:
        CheckpointError: torch did not write this archive.
    """
    pickles = [name for name in archive.records if name.endswith("/" + _PICKLE)]
    if not pickles:
        raise CheckpointError(
            f"{archive.source.path}: an archive without a pickle of torch; "
            "give a file that torch.save wrote"
        )
    return min(pickles, key=len).removesuffix(_PICKLE)


def _byteorder(archive: Archive, folder: str) -> str:
    record = archive.records.get(folder + "byteorder")
    is_big = record is not None and record.file_size == 3
    return "big" if is_big else "little"


def _extras(archive: Archive, folder: str) -> Iterator[tuple[str, StoredTensor]]:
    for name, record in archive.records.items():
        short = name.removeprefix(folder)
        if short in _BOOKKEEPING or short in (_PICKLE, _PROVENANCE) or short.startswith("data/"):
            continue
        if is_stored(record):
            storage = RecordStorage(record.file_size, "little", archive, record)
            yield f"record {short}", StoredTensor.viewing(storage, "uint8", (record.file_size,))


def _provenance(archive: Archive, folder: str) -> Mapping[str, object] | None:
    record = archive.records.get(folder + _PROVENANCE)
    if record is None:
        return None
    content = archive.content(record)
    return parse_provenance(content.read(0, min(content.size, LONGEST_PROVENANCE_BYTES)))
