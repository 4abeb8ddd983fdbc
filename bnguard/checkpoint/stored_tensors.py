"""Tensors as a file stores them: an element type, a shape, and where their elements are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnguard.checkpoint.files import CHUNK_BYTES, Source
from bnguard.errors import CheckpointError
from bnguard.layers.distances import FloatArray

if TYPE_CHECKING:
    import torch

CARRIERS = {
    "bool": "?",
    "uint8": "u1",
    "int8": "i1",
    "int16": "i2",
    "int32": "i4",
    "int64": "i8",
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
    "float16": "f2",
    "float32": "f4",
    "float64": "f8",
    "bfloat16": "u2",
    "float8_e4m3fn": "u1",
    "float8_e4m3fnuz": "u1",
    "float8_e5m2": "u1",
    "float8_e5m2fnuz": "u1",
    "float8_e8m0fnu": "u1",
    "complex32": "u4",
    "complex64": "c8",
    "complex128": "c16",
}
# The classes of torch's typed storages, whose names imply the type of the elements.
STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
FLOATING = frozenset({"float16", "bfloat16", "float32", "float64"})
INTEGER = frozenset(name for name, code in CARRIERS.items() if code[0] == "i" or name == "uint8")
# A tensor expanded from few stored elements is read in full up to here: a file of a hundred bytes
# must not ask for a terabyte.
_MOST_EXPANDED_BYTES = 2**26


def carrier(dtype: str, byteorder: str = "little") -> np.dtype[Any]:
    """Return the numpy type that carries the elements of a torch type.

    Raises:
        KeyError: No such type is known.

    >>> carrier("bfloat16").itemsize, carrier("float32").itemsize
    (2, 4)
    """
    return np.dtype(CARRIERS[dtype]).newbyteorder("<" if byteorder == "little" else ">")


def torch_dtype(name: str) -> torch.dtype:
    """Return the type of torch that has a name.

    Raises:
        CheckpointError: This version of torch has none.
    """
    import torch

    dtype = getattr(torch, name, None)
    if name not in CARRIERS or not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"a tensor is of type {name!a}, which torch {torch.__version__} lacks"
        )
    return dtype


def to_float64(carried: npt.NDArray[Any], dtype: str) -> FloatArray:
    """Return the values of elements read in their carrier type.

    >>> to_float64(np.array([0x3F80, 0xC000], dtype=np.uint16), "bfloat16").tolist()
    [1.0, -2.0]
    """
    if dtype == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        carried = (carried.astype(np.uint32) << 16).view(np.float32)
    # A signalling NaN is a NaN, and no reason for a warning.
    with np.errstate(invalid="ignore"):
        return carried.astype(np.float64)


@dataclass(frozen=True, eq=False)
class Storage(ABC):
    """Bytes in a file that one or more tensors view.

    Attributes:
        nbytes: Number of bytes.
        byteorder: ``"little"`` or ``"big"``.
    """

    nbytes: int
    byteorder: str

    @property
    @abstractmethod
    def source(self) -> Source:
        """Where the bytes lie."""


@dataclass(frozen=True, eq=False)
class PlainStorage(Storage):
    """A storage whose place in the file is known."""

    place: Source

    @property
    def source(self) -> Source:
        """Where the bytes lie."""
        return self.place


class NumpyStorage(PlainStorage):
    """The bytes of a pickled NumPy array, which are read and never replaced."""


@dataclass(frozen=True, eq=False)
class Piece:
    """A block of a tensor, viewing a storage.

    Attributes:
        storage: The bytes viewed.
        start: First element, counted in elements from the beginning of the storage.
        shape: Shape of the block.
        stride: Steps in elements, a dimension each.
        corner: Where the block begins in the tensor; all zeros where it is the whole.
    """

    storage: Storage
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    corner: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements follow each other in the storage, last dimension fastest."""
        return all(
            size == 1 or step == expected
            for size, step, expected in zip(
                self.shape, self.stride, contiguous_stride(self.shape), strict=True
            )
        )

    @property
    def span(self) -> tuple[int, int]:
        """First element and the one behind the last, in elements of the storage."""
        if 0 in self.shape:
            return self.start, self.start
        reach = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return self.start, self.start + reach + 1


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file; nothing of it is read until it is asked for.

    Attributes:
        dtype: Element type as torch names it.
        shape: Shape.
        find_pieces: Finds the blocks that cover the tensor; called once, when they are needed.
    """

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
        """Return a tensor that lies in one storage, contiguous where no stride is given."""
        stride = contiguous_stride(shape) if stride is None else stride
        piece = Piece(storage, start, shape, stride, (0,) * len(shape))
        return cls(dtype, shape, lambda: (piece,))

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """Blocks that cover the tensor; none where it has no values (meta device).

        Raises:
            CheckpointError: Where they lie cannot be read.
        """
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
        """Return the elements in the type that carries them (see ``dtypes``), native byte order.

        Raises:
            CheckpointError: Elements lie outside their storage, or are of an unknown type.
        """
        if len(self.pieces) == 1 and self.pieces[0].shape == self.shape:
            return self._read_piece(self.pieces[0])
        whole = np.empty(self.shape, self._carrier(self.pieces[0]).newbyteorder("="))
        for piece in self.pieces:
            block = tuple(
                slice(low, low + size) for low, size in zip(piece.corner, piece.shape, strict=True)
            )
            whole[block] = self._read_piece(piece)
        return whole

    def byte_chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the elements in order, in pieces of one size but for the last.

        A tensor that lies in the file as it is yielded is never held at once, however large.
        """
        if self.is_meta or self.numel == 0:
            return
        piece = self.pieces[0]
        is_whole = len(self.pieces) == 1 and piece.shape == self.shape
        if is_whole and piece.is_contiguous and piece.storage.byteorder == "little":
            first, stop = self.byte_span(piece)
            yield from piece.storage.source.chunks(first, stop - first)
            return
        data = self.read().tobytes()
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    def byte_span(self, piece: Piece) -> tuple[int, int]:
        """Return the first byte of a piece in its storage, and the one behind the last.

        Raises:
            CheckpointError: The piece reaches outside its storage, or the type is unknown.
        """
        itemsize = self._carrier(piece).itemsize
        first, stop = (position * itemsize for position in piece.span)
        if stop > piece.storage.nbytes:
            raise piece.storage.source.truncated()
        return first, stop

    def _read_piece(self, piece: Piece) -> npt.NDArray[Any]:
        first, stop = self.byte_span(piece)
        code = self._carrier(piece)
        if math.prod(piece.shape) * code.itemsize > max(piece.storage.nbytes, _MOST_EXPANDED_BYTES):
            raise CheckpointError(
                f"{piece.storage.source.path}: a tensor of shape {piece.shape} is stored in "
                f"{piece.storage.nbytes} bytes; it is too large to be expanded"
            )
        data = piece.storage.source.read(first, stop - first)
        strides = tuple(step * code.itemsize for step in piece.stride)
        view: npt.NDArray[Any] = np.ndarray(piece.shape, code, data, strides=strides)
        return view.astype(code.newbyteorder("="))

    def _carrier(self, piece: Piece) -> np.dtype[Any]:
        if self.dtype not in CARRIERS:
            raise CheckpointError(
                f"{piece.storage.source.path}: holds a tensor of type {self.dtype}, "
                "which bnguard cannot read"
            )
        return carrier(self.dtype, piece.storage.byteorder)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the steps of a tensor whose elements follow each other.

    >>> contiguous_stride((2, 3, 4))
    (12, 4, 1)
    """
    steps = [1]
    for size in reversed(shape[1:]):
        steps.append(steps[-1] * max(size, 1))
    return tuple(reversed(steps)) if shape else ()
