"""Files, or parts of them, that are read by position, and copied with some bytes replaced."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from bnguard.errors import CheckpointError

# Large enough to copy at the speed of the disk, small enough not to show in the memory.
CHUNK_BYTES = 8 * 2**20
_LONGEST_LINE_BYTES = 4096


@dataclass(frozen=True, eq=False)
class Source:
    """Bytes of an open file, from ``start``, ``size`` of them.

    The file is read, not mapped: a training run may overwrite a checkpoint while it is inspected,
    and a mapped file that shrinks kills the process.

    Attributes:
        path: The file, for messages.
        handle: The open file.
        start: Position of the first byte in the file.
        size: Number of bytes.
    """

    path: Path
    handle: BinaryIO
    start: int
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly ``size`` bytes from ``offset``.

        Raises:
            CheckpointError: They are not all there.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.truncated()
        try:
            self.handle.seek(self.start + offset)
            data = self.handle.read(size)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if len(data) < size:
            raise self.truncated()
        return data

    def chunks(self, offset: int, size: int) -> Iterator[bytes]:
        """Yield ``size`` bytes from ``offset``, in pieces that fit the memory."""
        for position in range(offset, offset + size, CHUNK_BYTES):
            yield self.read(position, min(CHUNK_BYTES, offset + size - position))

    def window(self, offset: int, size: int) -> Source:
        """Return a part of this source.

        Raises:
            CheckpointError: The part reaches beyond the end.
        """
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.truncated()
        return Source(self.path, self.handle, self.start + offset, size)

    def stream(self) -> io.BufferedReader:
        """Return the bytes as a file of its own, to be read from the first one on."""
        return _BoundedLines(self.raw_stream())

    def raw_stream(self) -> io.RawIOBase:
        """Return the bytes as an unbuffered file of its own."""
        return _Stream(self)

    def truncated(self) -> CheckpointError:
        """Return the error for bytes that should be there and are not."""
        return CheckpointError(
            f"{self.path}: the file is truncated or damaged; copy or save it again"
        )


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """Open a file to be read by position.

    Raises:
        CheckpointError: It cannot be opened.
    """
    try:
        handle = path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error
    with handle:
        yield Source(path, handle, 0, handle.seek(0, io.SEEK_END))


def first_bytes(path: Path, size: int) -> bytes:
    """Return the first bytes of a file, fewer where it is shorter; none of anything else.

    Raises:
        CheckpointError: It cannot be read.
    """
    if not path.is_file():
        return b""
    try:
        with path.open("rb") as handle:
            return handle.read(size)
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that the system does not let us read."""
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")


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


def write_all(target: BinaryIO, chunks: Iterable[bytes]) -> None:
    """Write pieces one behind the other."""
    for chunk in chunks:
        target.write(chunk)


class _BoundedLines(io.BufferedReader):
    """Bytes of which no line is read that is longer than a line of a pickle ever is."""

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(_LONGEST_LINE_BYTES)


class _Stream(io.RawIOBase):
    def __init__(self, source: Source) -> None:
        self._source = source
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._source.size}
        self._position = base[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    # typeshed's own type of the buffer is wider, and has no name in the standard library.
    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._source.size - self._position))
        buffer[:size] = self._source.read(self._position, size) if size else b""
        self._position += size
        return size


def _changed(chunk: bytes, start: int, patches: Iterable[Patch]) -> bytes:
    changed = bytearray(chunk)
    for patch in patches:
        low = max(patch.position, start)
        high = min(patch.position + len(patch.data), start + len(chunk))
        part = patch.data[low - patch.position : high - patch.position]
        changed[low - start : high - start] = part
    return bytes(changed)
