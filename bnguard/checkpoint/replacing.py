"""From new running statistics to the bytes that change in the files of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnguard.checkpoint.bn_entries import STATISTICS, attribute_of
from bnguard.checkpoint.contents import Contents, Entry, entries
from bnguard.checkpoint.dtypes import FLOATING, carrier, torch_dtype
from bnguard.checkpoint.patch import Patch
from bnguard.checkpoint.stored_tensors import Piece, StoredTensor
from bnguard.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def statistics_patches(contents: Contents, statistics: Mapping[str, Tensor]) -> tuple[Patch, ...]:
    """Return the patches that put new running statistics into an opened checkpoint.

    Tensors may view one storage with others. Two names of the same running statistic change
    together, as they would in memory; where anything else lies in the bytes that change, nothing
    is changed.

    Raises:
        CheckpointError: An entry does not exist or is no running statistic, a new tensor does not
            fit, or it would change another entry too.
    """
    if not statistics:
        raise CheckpointError(f"{contents.path}: there are no statistics to write into it")
    stored = _tensors(contents)
    changes = []
    for key, tensor in statistics.items():
        target = _target(contents, stored, key)
        values = _values(contents, key, target, tensor)
        changes += [_Change(key, target, piece, values) for piece in target.pieces]
    _check_neighbours(contents, stored, changes)
    return tuple(_patch(group) for group in _overlapping(changes))


@dataclass(frozen=True, eq=False)
class _Change:
    """A piece of a tensor that gets new elements.

    Attributes:
        key: Name of the entry.
        tensor: The tensor.
        piece: The piece.
        values: New elements of the whole tensor, in the type that carries them.
    """

    key: str
    tensor: StoredTensor
    piece: Piece
    values: npt.NDArray[Any]

    @property
    def span(self) -> tuple[int, int]:
        """First byte in the storage, and the one behind the last."""
        return self.tensor.byte_span(self.piece)

    @property
    def new_elements(self) -> npt.NDArray[Any]:
        """New elements of the piece."""
        corner, shape = self.piece.corner, self.piece.shape
        block = tuple(slice(c, c + s) for c, s in zip(corner, shape, strict=True))
        return np.asarray(self.values[block])


def _tensors(contents: Contents) -> dict[str, list[Entry]]:
    stored: dict[str, list[Entry]] = {}
    for entry in entries(contents):
        if isinstance(entry.value, StoredTensor):
            stored.setdefault(entry.key, []).append(entry)
    return stored


def _target(contents: Contents, stored: Mapping[str, Sequence[Entry]], key: str) -> StoredTensor:
    if attribute_of(key) not in STATISTICS:
        raise CheckpointError(
            f"{contents.path}: {key!r} is no running statistic; bnguard changes nothing else"
        )
    found = stored.get(key, ())
    if len(found) != 1:
        state = "holds several entries" if found else "has no entry"
        raise CheckpointError(f"{contents.path}: {state} {key!r}; name an entry of the checkpoint")
    target = found[0].value
    assert isinstance(target, StoredTensor)
    if target.is_meta:
        raise CheckpointError(
            f"{contents.path}: {key!r} was saved on the meta device and has no values to replace"
        )
    return target


def _values(contents: Contents, key: str, target: StoredTensor, tensor: Tensor) -> npt.NDArray[Any]:
    """Return the elements of a new tensor in the type that carries those of the stored one."""
    import torch

    if tuple(tensor.shape) != target.shape:
        raise CheckpointError(
            f"{contents.path}: {key!r} has shape {target.shape}, its new value "
            f"{tuple(tensor.shape)}"
        )
    new = tensor.detach().to("cpu", torch_dtype(target.dtype))
    is_overflow = target.dtype in FLOATING and bool(
        (torch.isinf(new) & torch.isfinite(tensor.detach().cpu())).any()
    )
    if is_overflow:
        raise CheckpointError(
            f"{contents.path}: the new {key!r} is too large for {target.dtype}, the type that "
            "the checkpoint stores it in; save the model in float32"
        )
    raw = new.reshape(-1).contiguous().view(torch.uint8)
    return np.frombuffer(raw.numpy().tobytes(), carrier(target.dtype)).reshape(target.shape)


def _check_neighbours(
    contents: Contents, stored: Mapping[str, Sequence[Entry]], changes: Sequence[_Change]
) -> None:
    """Refuse to change bytes that another entry views too."""
    by_storage: dict[int, list[_Change]] = {}
    for change in changes:
        positions = _positions(change.tensor, change.piece)
        if np.unique(positions).size != positions.size:
            raise _shares_bytes(contents, change.key, "itself: it was saved expanded")
        by_storage.setdefault(id(change.piece.storage), []).append(change)
    for entry in (entry for group in stored.values() for entry in group):
        assert isinstance(entry.value, StoredTensor)
        for piece in entry.value.pieces:
            for change in by_storage.get(id(piece.storage), ()):
                if not _is_harmless(change, entry, entry.value, piece, changes):
                    raise _shares_bytes(contents, change.key, repr(entry.key))


def _is_harmless(
    change: _Change,
    entry: Entry,
    tensor: StoredTensor,
    piece: Piece,
    changes: Sequence[_Change],
) -> bool:
    """Whether an entry has no byte in common with a change, or is the same running statistic."""
    low, high = change.span
    first, stop = tensor.byte_span(piece)
    if stop <= low or high <= first:
        return True
    is_same = (tensor.dtype, piece.start, piece.shape, piece.stride) == (
        change.tensor.dtype,
        change.piece.start,
        change.piece.shape,
        change.piece.stride,
    )
    if is_same and attribute_of(entry.key) == attribute_of(change.key):
        others = [c for c in changes if c.key == entry.key and c.piece.storage is piece.storage]
        return all(np.array_equal(c.values, change.values, equal_nan=True) for c in others)
    positions = _positions(change.tensor, change.piece)
    if piece.is_contiguous:
        return not bool(((first <= positions) & (positions < stop)).any())
    return np.intersect1d(positions, _positions(tensor, piece)).size == 0


def _positions(tensor: StoredTensor, piece: Piece) -> npt.NDArray[np.int64]:
    """Return the bytes of a piece, counted from the beginning of its storage."""
    first, stop = tensor.byte_span(piece)
    itemsize = carrier(tensor.dtype).itemsize
    indices = np.arange(stop - first, dtype=np.int64) + first
    window = indices.reshape(-1, itemsize)
    strides = tuple(step * itemsize * indices.itemsize for step in piece.stride)
    view = np.lib.stride_tricks.as_strided(
        window, (*piece.shape, itemsize), (*strides, indices.itemsize), writeable=False
    )
    return np.asarray(view.reshape(-1))


def _shares_bytes(contents: Contents, key: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{contents.path}: {key!r} shares its bytes with {other}, which must not change; "
        "save clones of the tensors"
    )


def _overlapping(changes: Iterable[_Change]) -> list[list[_Change]]:
    """Return the changes in groups whose spans interleave, so that each is patched at once."""
    groups: list[list[_Change]] = []
    reach, storage = 0, None
    for change in sorted(changes, key=lambda c: (id(c.piece.storage), c.span)):
        low, high = change.span
        if groups and change.piece.storage is storage and low < reach:
            groups[-1].append(change)
            reach = max(reach, high)
        else:
            groups.append([change])
            reach, storage = high, change.piece.storage
    return groups


def _patch(group: Sequence[_Change]) -> Patch:
    low = min(change.span[0] for change in group)
    high = max(change.span[1] for change in group)
    source = group[0].piece.storage.source
    data = bytearray(source.read(low, high - low))
    for change in group:
        code = carrier(change.tensor.dtype, change.piece.storage.byteorder)
        strides = tuple(step * code.itemsize for step in change.piece.stride)
        view: npt.NDArray[Any] = np.ndarray(
            change.piece.shape, code, data, change.span[0] - low, strides
        )
        view[...] = change.new_elements
    return Patch(source.path, source.start + low, bytes(data))
