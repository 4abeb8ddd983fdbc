"""The directory of a zip archive, as torch writes it: which record lies where, nothing unpacked.

torch stores its records uncompressed, so that each can be read, and replaced, where it lies. The
layout is that of PKWARE's APPNOTE.TXT, sections 4.3 (headers) and 4.5.3 (zip64).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from bnguard.checkpoint.sources import Source, printable
from bnguard.errors import CheckpointError

LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
DIRECTORY_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
ZIP64_END = struct.Struct("<4sQHHIIQQQQ")
ZIP64_LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4sHHHHIIH")

LOCAL_MAGIC = b"PK\x03\x04"
ENTRY_MAGIC = b"PK\x01\x02"
ZIP64_END_MAGIC = b"PK\x06\x06"
ZIP64_LOCATOR_MAGIC = b"PK\x06\x07"
END_MAGIC = b"PK\x05\x06"
DESCRIPTOR_MAGIC = b"PK\x07\x08"

# A field of 32 bits with this value stands in the zip64 extra field instead.
IN_ZIP64 = 0xFFFFFFFF
_HAS_DESCRIPTOR = 0x0008
_IS_ENCRYPTED = 0x0001
_LONGEST_COMMENT_BYTES = 2**16
# A million records; each costs some 300 bytes of memory.
_LARGEST_DIRECTORY_BYTES = 2**26


@dataclass(frozen=True, slots=True)
class Record:
    """A file in the archive.

    Attributes:
        name: Its path in the archive.
        header: Position of its local header.
        size: Bytes of its content.
        entry: Position of its entry in the directory, counted from where the directory begins.
        entry_size: Bytes of that entry.
        has_descriptor: Whether its checksum stands behind its content, not in its local header.
        is_stored: Whether it is neither compressed nor encrypted.
    """

    name: str
    header: int
    size: int
    entry: int
    entry_size: int
    has_descriptor: bool
    is_stored: bool


@dataclass(frozen=True, eq=False)
class Archive:
    """A zip archive whose directory has been read.

    Attributes:
        source: The bytes of the archive.
        records: Its files by name.
        directory: The directory, as it stands in the archive.
        directory_start: Where the directory stands.
    """

    source: Source
    records: dict[str, Record]
    directory: bytes
    directory_start: int

    def content(self, record: Record) -> Source:
        """Return the content of a record.

        Raises:
            CheckpointError: It is compressed or encrypted, or its header is damaged.
        """
        if not record.is_stored:
            raise CheckpointError(
                f"{self.source.path}: its record {printable(record.name[:80])} is compressed or "
                "encrypted, which torch never does; save the checkpoint again with torch.save"
            )
        header = LOCAL_HEADER.unpack(self.source.read(record.header, LOCAL_HEADER.size))
        if header[0] != LOCAL_MAGIC:
            raise self.source.truncated()
        name_size, extra_size = header[9:11]
        return self.source.window(
            record.header + LOCAL_HEADER.size + name_size + extra_size, record.size
        )


def read_archive(source: Source) -> Archive:
    """Read the directory of an archive.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    count, size, start = _end_of_directory(source)
    if size > _LARGEST_DIRECTORY_BYTES:
        raise CheckpointError(
            f"{source.path}: its archive lists more records than bnguard reads; "
            "save the state dict alone"
        )
    directory = source.read(start, size)
    records = {}
    position = 0
    for _ in range(count):
        if len(directory) - position < DIRECTORY_ENTRY.size:
            raise source.truncated()
        entry = DIRECTORY_ENTRY.unpack_from(directory, position)
        name_start = position + DIRECTORY_ENTRY.size
        extra_start = name_start + entry[10]
        stop = extra_start + entry[11] + entry[12]
        if entry[0] != ENTRY_MAGIC or stop > len(directory):
            raise source.truncated()
        name = directory[name_start:extra_start].decode("utf-8", "replace")
        extra = directory[extra_start : extra_start + entry[11]]
        records[name] = _record(source, name, entry, extra, position, stop - position)
        position = stop
    return Archive(source, records, directory, start)


def _record(
    source: Source, name: str, entry: tuple[int, ...], extra: bytes, position: int, entry_size: int
) -> Record:
    flags, method = entry[3], entry[4]
    compressed, size, header = entry[8], entry[9], entry[16]
    # Fields that do not fit 32 bits stand in the extra field, in this order.
    wide = _zip64_values(extra)
    try:
        size = wide.pop(0) if size == IN_ZIP64 else size
        compressed = wide.pop(0) if compressed == IN_ZIP64 else compressed
        header = wide.pop(0) if header == IN_ZIP64 else header
    except IndexError:
        raise source.truncated() from None
    return Record(
        name=name,
        header=header,
        size=size,
        entry=position,
        entry_size=entry_size,
        has_descriptor=bool(flags & _HAS_DESCRIPTOR),
        is_stored=method == 0 and compressed == size and not flags & _IS_ENCRYPTED,
    )


def _zip64_values(extra: bytes) -> list[int]:
    position = 0
    while position + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            values = extra[position + 4 : position + 4 + size]
            return [value for (value,) in struct.iter_unpack("<Q", values[: len(values) // 8 * 8])]
        position += 4 + size
    return []


def _end_of_directory(source: Source) -> tuple[int, int, int]:
    """Return the number of entries of the directory, its size and its position."""
    tail_size = min(source.size, END.size + _LONGEST_COMMENT_BYTES)
    tail = source.read(source.size - tail_size, tail_size)
    found = tail.rfind(END_MAGIC)
    if found < 0 or found + END.size > len(tail):
        raise source.truncated()
    end = END.unpack_from(tail, found)
    count, size, start = end[4:7]
    locator_at = source.size - tail_size + found - ZIP64_LOCATOR.size
    if locator_at >= 0:
        locator = ZIP64_LOCATOR.unpack(source.read(locator_at, ZIP64_LOCATOR.size))
        if locator[0] == ZIP64_LOCATOR_MAGIC:
            end = ZIP64_END.unpack(source.read(locator[2], ZIP64_END.size))
            if end[0] != ZIP64_END_MAGIC:
                raise source.truncated()
            count, size, start = end[7:10]
    return count, size, start
