"""Zip archives as torch writes them: records that are read, and checksummed, where they lie.

torch stores its records uncompressed, so that each can be read, and replaced, in place. The
standard library reads the directory; the two positions that it does not tell are those of
PKWARE's APPNOTE.TXT, section 4.3.
"""

from __future__ import annotations

import io
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

from bnguard.checkpoint.files import Source, printable
from bnguard.checkpoint.patch import Patch, patched
from bnguard.errors import CheckpointError

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
