"""Bytes in a file that are replaced while it is copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bnguard.checkpoint.files import Source


@dataclass(frozen=True)
class Patch:
    """Bytes that replace those at a place in a file; the file keeps its length.

    Attributes:
        path: The file.
        position: Where they begin in the file.
        data: The new bytes.
    """

    path: Path
    position: int
    data: bytes


def patched(source: Source, patches: Iterable[Patch]) -> Iterator[bytes]:
    """Yield the bytes of a source with the patches applied, in pieces that fit the memory."""
    ordered = sorted(patches, key=lambda patch: patch.position)
    start = source.start
    for chunk in source.chunks(0, source.size):
        stop = start + len(chunk)
        inside = [p for p in ordered if p.position < stop and p.position + len(p.data) > start]
        yield _changed(chunk, start, inside) if inside else chunk
        start = stop


def _changed(chunk: bytes, start: int, patches: Iterable[Patch]) -> bytes:
    changed = bytearray(chunk)
    for patch in patches:
        low = max(patch.position, start)
        high = min(patch.position + len(patch.data), start + len(chunk))
        part = patch.data[low - patch.position : high - patch.position]
        changed[low - start : high - start] = part
    return bytes(changed)


def write_all(target: BinaryIO, chunks: Iterable[bytes]) -> None:
    """Write pieces one behind the other."""
    for chunk in chunks:
        target.write(chunk)
