"""Changing a zip archive where it lies: new checksums for new content, and one more record."""

from __future__ import annotations

import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from bnguard.checkpoint.archive import (
    DESCRIPTOR_MAGIC,
    DIRECTORY_ENTRY,
    END,
    END_MAGIC,
    ENTRY_MAGIC,
    IN_ZIP64,
    LOCAL_HEADER,
    LOCAL_MAGIC,
    ZIP64_END,
    ZIP64_END_MAGIC,
    ZIP64_LOCATOR,
    ZIP64_LOCATOR_MAGIC,
    Archive,
    Record,
)
from bnguard.checkpoint.patch import Patch, patched

_CRC_IN_LOCAL_HEADER = 14
_CRC_IN_ENTRY = 16
_UTF8 = 0x0800
_VERSION = 45  # of the specification: the first with zip64
_FITS_16_BITS = 0xFFFF
# torch aligns contents to this, and fills the gap with an extra field of this name.
_ALIGNMENT = 64
_PADDING_FIELD = b"FB"
_PADDING = b"Z"


def checksum_patches(archive: Archive, patches: Sequence[Patch]) -> Iterator[Patch]:
    """Yield patches for the CRC-32 of every record whose content the given patches change.

    Raises:
        CheckpointError: A record cannot be read.
    """
    source = archive.source
    for record in _changed_records(archive, patches):
        content = archive.content(record)
        crc = 0
        for chunk in patched(content, patches):
            crc = zlib.crc32(chunk, crc)
        data = struct.pack("<I", crc)
        entry = source.start + archive.directory_start + record.entry
        yield Patch(source.path, entry + _CRC_IN_ENTRY, data)
        if not record.has_descriptor:
            yield Patch(source.path, source.start + record.header + _CRC_IN_LOCAL_HEADER, data)
            continue
        end = content.start - source.start + content.size
        has_magic = source.read(end, len(DESCRIPTOR_MAGIC)) == DESCRIPTOR_MAGIC
        behind_magic = len(DESCRIPTOR_MAGIC) if has_magic else 0
        yield Patch(source.path, source.start + end + behind_magic, data)


def _changed_records(archive: Archive, patches: Sequence[Patch]) -> list[Record]:
    records = sorted(archive.records.values(), key=lambda record: record.header)
    headers = [archive.source.start + record.header for record in records]
    first, stop = archive.source.start, archive.source.start + archive.source.size
    places = {bisect_left(headers, p.position) - 1 for p in patches if first <= p.position < stop}
    return [records[place] for place in sorted(places)]


def new_record(name: str, data: bytes, position: int) -> tuple[bytes, bytes]:
    """Return a record to be written at a position, and its entry in the directory."""
    encoded = name.encode()
    content_start = position + LOCAL_HEADER.size + len(encoded) + 4
    gap = -content_start % _ALIGNMENT
    padding = _PADDING_FIELD + struct.pack("<H", gap) + _PADDING * gap
    # Version needed, flags, method, time, date, checksum, size twice.
    common = (_VERSION, _UTF8, 0, 0, 0, zlib.crc32(data), len(data), len(data))
    header = LOCAL_HEADER.pack(LOCAL_MAGIC, *common, len(encoded), len(padding))
    # The position may not fit 32 bits; the zip64 extra field always does.
    wide = struct.pack("<HHQ", 1, 8, position)
    entry = DIRECTORY_ENTRY.pack(
        ENTRY_MAGIC, _VERSION, *common, len(encoded), len(wide), 0, 0, 0, 0, IN_ZIP64
    )
    return header + encoded + padding + data, entry + encoded + wide


def end_of_directory(count: int, size: int, start: int) -> bytes:
    """Return what follows a directory of ``count`` entries, ``size`` bytes from ``start``."""
    zip64 = ZIP64_END.pack(
        ZIP64_END_MAGIC, ZIP64_END.size - 12, _VERSION, _VERSION, 0, 0, count, count, size, start
    )
    locator = ZIP64_LOCATOR.pack(ZIP64_LOCATOR_MAGIC, 0, start + size, 1)
    short = min(count, _FITS_16_BITS)
    end = END.pack(END_MAGIC, 0, 0, short, short, min(size, IN_ZIP64), min(start, IN_ZIP64), 0)
    return zip64 + locator + end
