"""Bytes in open files, the storages that they make up, and the tensors that view the storages."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bnguard.errors import CheckpointError
from bnguard.layers.distances import FloatArray

if TYPE_CHECKING:
    import torch

# Large enough to copy at the speed of the disk, small enough not to show in the memory.
CHUNK_BYTES = 8 * 2**20
# No pickle has a longer line, and no archive a larger directory: that is about a million records.
_LONGEST_LINE_BYTES = 4096
_LARGEST_READ_BYTES = 2**26
# A tensor expanded from few stored elements is read in full up to here: a file of a hundred bytes
# must not ask for a terabyte.
_MOST_EXPANDED_BYTES = 2**26

# The types that NumPy has too, under the same names.
NUMPY_TYPES = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
# The numpy type that carries the elements of a torch type.
CARRIERS = {name: name for name in NUMPY_TYPES} | {
    "bfloat16": "uint16",
    "float8_e4m3fn": "uint8",
    "float8_e4m3fnuz": "uint8",
    "float8_e5m2": "uint8",
    "float8_e5m2fnuz": "uint8",
    "float8_e8m0fnu": "uint8",
    "complex32": "uint32",
}
FLOATING = frozenset({"float16", "bfloat16", "float32", "float64"})
INTEGER = frozenset({"uint8", "int8", "int16", "int32", "int64"})


@dataclass(frozen=True)
class Patch:
    """New bytes from a position in a file on, which keeps its length."""

    path: Path
    position: int
    data: bytes


@dataclass(frozen=True, eq=False)
class Source:
    """A range of bytes in an open file: ``size`` bytes from the position ``start``.

    The file is read, not mapped: a training run may overwrite a checkpoint while it is inspected,
    and a mapped file that shrinks kills the process.
    """

    path: Path
    handle: BinaryIO
    start: int
    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly ``size`` bytes from ``offset``."""
        place = self.window(offset, size)
        try:
            self.handle.seek(place.start)
            data = self.handle.read(size)
        except OSError as error:
            raise unreadable(self.path, error) from error
        if len(data) < size:
            raise self.truncated()
        return data

    def chunks(self, offset: int = 0, size: int | None = None) -> Iterator[bytes]:
        """Yield ``size`` bytes from ``offset`` (default: all), in pieces that fit the memory."""
        stop = self.size if size is None else offset + size
        for position in range(offset, stop, CHUNK_BYTES):
            yield self.read(position, min(CHUNK_BYTES, stop - position))

    def patched(self, patches: Iterable[Patch]) -> Iterator[bytearray]:
        """Yield all bytes with the patches applied, in pieces that fit the memory."""
        patches = list(patches)
        start = self.start
        for chunk in self.chunks():
            changed, stop = bytearray(chunk), start + len(chunk)
            for patch in patches:
                low, high = max(patch.position, start), min(patch.position + len(patch.data), stop)
                if low < high:
                    new = patch.data[low - patch.position : high - patch.position]
                    changed[low - start : high - start] = new
            yield changed
            start = stop

    def window(self, offset: int, size: int) -> Source:
        """Return a part of this range."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.truncated()
        return Source(self.path, self.handle, self.start + offset, size)

    def stream(self) -> io.BufferedReader:
        """Return the bytes as a file of its own."""
        return _BoundedReader(_Stream(self))

    def truncated(self) -> CheckpointError:
        """Return the error for bytes that are missing."""
        return CheckpointError(
            f"{self.path}: the file is truncated or damaged; copy or save it again"
        )


class _BoundedReader(io.BufferedReader):
    """Bytes, without trust in the sizes that a file gives."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _LARGEST_READ_BYTES:
            raise ValueError("more bytes at once than bnguard reads")
        return super().read(size)

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

    # typeshed's own type of the buffer is wider, and has no name in the standard library.
    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        size = max(0, min(len(buffer), self._source.size - self._position))
        buffer[:size] = self._source.read(self._position, size) if size else b""
        self._position += size
        return size


class OpenFiles(ExitStack):
    """The files of a checkpoint, each opened once; all are closed together."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[Path, Source] = {}

    def open(self, path: Path) -> Source:
        """Open a file to read it by position."""
        if path not in self._sources:
            try:
                handle = self.enter_context(path.open("rb"))
            except OSError as error:
                raise unreadable(path, error) from error
            self._sources[path] = Source(path, handle, 0, handle.seek(0, io.SEEK_END))
        return self._sources[path]

    def first_bytes(self, path: Path, size: int) -> bytes:
        """Return the first bytes of a file, fewer if it is shorter; none of a folder or a pipe."""
        if not path.is_file():
            return b""
        source = self.open(path)
        return source.read(0, min(size, source.size))


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that the system cannot read."""
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}")


def carrier(dtype: str, byteorder: str = "little") -> np.dtype[Any]:
    """Return the numpy type that carries the elements of a known torch type.

    >>> carrier("bfloat16").itemsize, carrier("float32").itemsize
    (2, 4)
    """
    return np.dtype(CARRIERS[dtype]).newbyteorder("<" if byteorder == "little" else ">")


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's type of this name."""
    import torch

    dtype = getattr(torch, name, None)
    if name not in CARRIERS or not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"a tensor is of type {name!a}, which torch {torch.__version__} lacks"
        )
    return dtype


@dataclass(frozen=True, eq=False)
class Storage:
    """Bytes in a file that one or more tensors view; they are found when they are needed.

    A copy of the file cannot have other bytes in place of a NumPy array, a part of the pickle.
    """

    nbytes: int
    byteorder: str
    find_source: Callable[[], Source]
    is_replaceable: bool = True


@dataclass(frozen=True, eq=False)
class Piece:
    """A block of a tensor, viewing a storage.

    Attributes:
        start: First element, counted in elements from the beginning of the storage.
        stride: Step of each dimension, in elements.
        corner: Where the block begins in the tensor; all zeros if it is the whole.
    """

    storage: Storage
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    corner: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow each other in the storage, last dimension fastest."""
        steps = zip(self.shape, self.stride, _contiguous_stride(self.shape), strict=True)
        return all(size == 1 or step == expected for size, step, expected in steps)

    def byte_span(self, dtype: str) -> tuple[int, int]:
        """Return the first byte of the block in its storage, and the one behind the last."""
        itemsize = self.carrier(dtype).itemsize
        reach = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        stop = self.start if 0 in self.shape else self.start + reach + 1
        if stop * itemsize > self.storage.nbytes:
            raise self.storage.find_source().truncated()
        return self.start * itemsize, stop * itemsize

    def read(self, dtype: str) -> npt.NDArray[Any]:
        """Return the elements, as :meth:`StoredTensor.read` does."""
        first, stop = self.byte_span(dtype)
        code, source = self.carrier(dtype), self.storage.find_source()
        if math.prod(self.shape) * code.itemsize > max(self.storage.nbytes, _MOST_EXPANDED_BYTES):
            raise CheckpointError(
                f"{source.path}: a tensor of shape {self.shape} is stored in "
                f"{self.storage.nbytes} bytes; it is too large to be expanded"
            )
        data = source.read(first, stop - first)
        strides = tuple(step * code.itemsize for step in self.stride)
        view: npt.NDArray[Any] = np.ndarray(self.shape, code, data, strides=strides)
        return view.astype(code.newbyteorder("="))

    def carrier(self, dtype: str) -> np.dtype[Any]:
        """Return the numpy type that carries the elements."""
        if dtype not in CARRIERS:
            path = self.storage.find_source().path
            raise CheckpointError(
                f"{path}: holds a tensor of type {dtype}, which bnguard cannot read"
            )
        return carrier(dtype, self.storage.byteorder)


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file, of an element type as torch names it; read when its values are needed."""

    dtype: str
    shape: tuple[int, ...]
    find_pieces: Callable[[], tuple[Piece, ...]]

    @classmethod
    def viewing(
        cls,
        storage: Storage,
        dtype: str,
        shape: tuple[int, ...],
        start: int = 0,
        stride: tuple[int, ...] | None = None,
    ) -> StoredTensor:
        """Return a tensor in one storage, contiguous if no stride is given."""
        stride = _contiguous_stride(shape) if stride is None else stride
        piece = Piece(storage, start, shape, stride, (0,) * len(shape))
        return cls(dtype, shape, lambda: (piece,))

    @classmethod
    def at(cls, place: Source, dtype: str, shape: tuple[int, ...]) -> StoredTensor:
        """Return a tensor whose elements follow each other, little-endian, in a range of a file."""
        return cls.viewing(Storage(place.size, "little", lambda: place), dtype, shape)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Blocks that cover the tensor; none if it has no values (meta device)."""
        return self.find_pieces()

    @property
    def is_meta(self) -> bool:
        """Whether the tensor was on the meta device: a shape without values."""
        return not self.pieces

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def read(self) -> npt.NDArray[Any]:
        """Return the elements in the type that carries them, native byte order."""
        if self._is_one_piece:
            return self.pieces[0].read(self.dtype)
        whole = np.empty(self.shape, self.pieces[0].carrier(self.dtype).newbyteorder("="))
        for piece in self.pieces:
            corner_and_shape = zip(piece.corner, piece.shape, strict=True)
            block = tuple(slice(low, low + size) for low, size in corner_and_shape)
            whole[block] = piece.read(self.dtype)
        return whole

    def to_float64(self) -> FloatArray:
        """Return the values of a floating-point tensor."""
        carried = self.read()
        if self.dtype == "bfloat16":
            # A bfloat16 is the upper half of a float32.
            carried = (carried.astype(np.uint32) << 16).view(np.float32)
        # A signalling NaN is a NaN, and no reason for a warning.
        with np.errstate(invalid="ignore"):
            return carried.astype(np.float64)

    def byte_chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the elements in order, in pieces of equal size except the last.

        Of an unknown type these are all bytes of its storage.
        """
        if self.is_meta or self.numel == 0:
            return
        piece = self.pieces[0]
        if self.dtype not in CARRIERS:  # and the size of an element is unknown
            for each in self.pieces:
                yield from each.storage.find_source().chunks()
            return
        # A contiguous tensor is never held in memory at once, however large it is.
        if self._is_one_piece and piece.is_contiguous and piece.storage.byteorder == "little":
            first, stop = piece.byte_span(self.dtype)
            yield from piece.storage.find_source().chunks(first, stop - first)
            return
        data = self.read().tobytes()
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    @property
    def _is_one_piece(self) -> bool:
        return len(self.pieces) == 1 and self.pieces[0].shape == self.shape


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the steps of a tensor whose elements follow each other.

    >>> _contiguous_stride((2, 3, 4))
    (12, 4, 1)
    """
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * max(size, 1))
    return tuple(reversed(steps)) if shape else ()
