"""New running statistics as patches: the bytes that change in the files of a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnguard.checkpoint.bn_entries import STATISTICS
from bnguard.checkpoint.contents import entries
from bnguard.checkpoint.formats import OpenCheckpoint
from bnguard.checkpoint.storage import FLOATING, Patch, Piece, StoredTensor, carrier, torch_dtype
from bnguard.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def statistics_patches(
    checkpoint: OpenCheckpoint, statistics: Mapping[str, Tensor]
) -> tuple[Patch, ...]:
    """Return the patches that put new running statistics into an open checkpoint.

    Tensors may view one storage with others. Two names of the same running statistic change
    together, as they would in memory; if any other entry views bytes that would change, it is an
    error.

    Raises:
        CheckpointError: An entry does not exist or is not a running statistic, a new tensor does
            not fit, or it would change another entry too.
    """
    if not statistics:
        raise CheckpointError(f"{checkpoint.path}: there are no statistics to write into it")
    stored: dict[str, list[StoredTensor]] = {}
    for entry in entries(checkpoint):
        if isinstance(entry.value, StoredTensor):
            stored.setdefault(entry.key, []).append(entry.value)
    changes: list[_Change] = []
    for key, tensor in statistics.items():
        try:
            changes += _changes(key, stored.get(key, ()), tensor)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
    _check_neighbours(checkpoint, stored, changes)
    return tuple(patch for change in changes for patch in change.patches())


@dataclass(frozen=True, eq=False)
class _Change:
    """A piece of a tensor with new elements.

    Attributes:
        key: Name of the entry.
        dtype: Type of its elements.
        piece: The piece.
        data: The new elements in the order of its shape, as bytes.
    """

    key: str
    dtype: str
    piece: Piece
    data: bytes

    def patches(self) -> Iterator[Patch]:
        source = self.piece.storage.find_source()
        first, _ = self.piece.byte_span(self.dtype)
        if self.piece.is_contiguous:
            yield Patch(source.path, source.start + first, self.data)
            return
        size = carrier(self.dtype).itemsize
        for number, position in enumerate(_byte_positions(self.piece, self.dtype)[::size].tolist()):
            element = self.data[number * size : (number + 1) * size]
            yield Patch(source.path, source.start + position, element)

    def overlaps(self, dtype: str, piece: Piece) -> bool:
        """Return whether a piece of the same storage has a byte in common with this one."""
        low, high = self.piece.byte_span(self.dtype)
        first, stop = piece.byte_span(dtype)
        if stop <= low or high <= first:
            return False
        is_expanded = math.prod(piece.shape) * carrier(dtype).itemsize > piece.storage.nbytes
        if is_expanded:
            return True
        positions = _byte_positions(self.piece, self.dtype)
        if piece.is_contiguous:
            return bool(((first <= positions) & (positions < stop)).any())
        return np.intersect1d(positions, _byte_positions(piece, dtype)).size > 0

    def is_same_statistic(self, key: str, dtype: str, piece: Piece) -> bool:
        """Return whether an entry is another name of this running statistic."""
        own, other = self.piece, piece
        is_same = (own.start, own.shape, own.stride) == (other.start, other.shape, other.stride)
        return is_same and (_attribute(self.key), self.dtype) == (_attribute(key), dtype)


def _changes(key: str, found: Sequence[StoredTensor], tensor: Tensor) -> Iterator[_Change]:
    """Yield the changes of one entry.

    Raises:
        ValueError: It cannot be changed, or the tensor does not fit.
    """
    if _attribute(key) not in STATISTICS:
        raise ValueError(f"{key!r} is not a running statistic; bnguard changes nothing else")
    if len(found) != 1:
        state = "holds several entries" if found else "has no entry"
        raise ValueError(f"{state} {key!r}; name an entry of the checkpoint")
    (target,) = found
    if not all(piece.storage.is_replaceable for piece in target.pieces):
        raise ValueError(
            f"{key!r} is a NumPy array, which bnguard reads but does not change; "
            "save {k: torch.as_tensor(v) for k, v in state.items()}"
        )
    if target.is_meta:
        raise ValueError(f"{key!r} was saved on the meta device and has no values to replace")
    if tuple(tensor.shape) != target.shape:
        shapes = f"{target.shape}, its new value {tuple(tensor.shape)}"
        raise ValueError(f"{key!r} has shape {shapes}")
    values = _elements(key, target.dtype, tensor)
    for piece in target.pieces:
        if np.unique(positions := _byte_positions(piece, target.dtype)).size != positions.size:
            raise ValueError(
                f"{key!r} shares its bytes with itself: it was saved expanded; "
                "save clones of the tensors"
            )
        block = tuple(slice(c, c + s) for c, s in zip(piece.corner, piece.shape, strict=True))
        data = np.asarray(values[block]).astype(piece.carrier(target.dtype)).tobytes()
        yield _Change(key, target.dtype, piece, data)


def _elements(key: str, dtype: str, tensor: Tensor) -> npt.NDArray[Any]:
    """Return the elements of a tensor in the type that carries those of a stored type.

    Raises:
        ValueError: A value is too large for the stored type.
    """
    import torch

    new = tensor.detach().to("cpu", torch_dtype(dtype))
    overflow = torch.isinf(new) & torch.isfinite(tensor.detach().cpu())
    if dtype in FLOATING and bool(overflow.any()):
        raise ValueError(
            f"the new {key!r} is too large for {dtype}, the type that the checkpoint stores it in; "
            "save the model in float32"
        )
    raw = new.reshape(-1).contiguous().view(torch.uint8)
    return np.frombuffer(raw.numpy().tobytes(), carrier(dtype)).reshape(new.shape)


def _check_neighbours(
    checkpoint: OpenCheckpoint,
    stored: Mapping[str, Sequence[StoredTensor]],
    changes: Sequence[_Change],
) -> None:
    """Refuse to change bytes that another entry views too."""
    by_storage: dict[int, list[_Change]] = {}
    for change in changes:
        by_storage.setdefault(id(change.piece.storage), []).append(change)
    pieces = (
        (key, tensor.dtype, piece)
        for key, tensors in stored.items()
        for tensor in tensors
        for piece in tensor.pieces
    )
    for key, dtype, piece in pieces:
        inside = by_storage.get(id(piece.storage), ())
        for change in inside:
            if not change.overlaps(dtype, piece):
                continue
            contradictions = [c for c in inside if c.key == key and c.data != change.data]
            if contradictions or not change.is_same_statistic(key, dtype, piece):
                raise CheckpointError(
                    f"{checkpoint.path}: {change.key!r} shares its bytes with {key!r}, which must "
                    "not change; save clones of the tensors"
                )


def _attribute(key: str) -> str:
    return key.rpartition(".")[2]


def _byte_positions(piece: Piece, dtype: str) -> npt.NDArray[np.int64]:
    """Return the bytes of a piece, in the order of its elements, by position in its storage."""
    itemsize = carrier(dtype).itemsize
    indices = np.indices(piece.shape).reshape(len(piece.shape), math.prod(piece.shape))
    elements = piece.start + np.array(piece.stride, np.int64) @ indices
    return np.asarray((elements[:, None] * itemsize + np.arange(itemsize)).reshape(-1))
