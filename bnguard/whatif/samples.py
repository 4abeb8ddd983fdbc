"""The samples that every row of the table is measured on, read from a loader once."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from statistics import mode

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bnguard.errors import CalibrationError
from bnguard.observe.model_inputs import compare_batches, usual_ratio
from bnguard.recalibration.batches import (
    Batch,
    Forward,
    can_be_joined,
    is_dense,
    join_batches,
    read_batches,
    shuffle_indices,
)

# Fewer batches cannot show whether they are sorted.
MIN_BATCHES = 8


@dataclass(frozen=True, eq=False)
class Samples:
    """Some samples of a loader, in its batches.

    Attributes:
        batches: As the model takes them, on its device.
    """

    batches: tuple[Batch, ...]

    def __len__(self) -> int:
        return sum(batch.size for batch in self.batches)

    @property
    def batch_size(self) -> int:
        """The size that most batches have."""
        return mode(batch.size for batch in self.batches)

    @cached_property
    def whole(self) -> Batch | None:
        """All samples as one batch; None if they do not fit together."""
        first, *others = self.batches
        if not all(can_be_joined(first, other) for other in others):
            return None
        return join_batches(self.batches) if first.can_be_cut else None

    def of_size(self, size: int) -> tuple[Batch, ...]:
        """Return batches that fall into parts of this size, joined if they have to be."""
        if not self.must_be_joined(size):
            return self.batches
        assert self.whole is not None
        return tuple(_cut(self.whole, size))

    def must_be_joined(self, size: int) -> bool:
        """Whether a batch as it comes is too small to be cut into parts of this size."""
        return size != self.batch_size and 2 * size > self.batch_size

    def shuffled(self) -> tuple[list[int], tuple[Batch, ...]] | None:
        """Return batches of the same size with other neighbours, and the position of each sample.

        None if there is nothing to shuffle, or the samples do not fit together.
        """
        whole = self.whole
        if whole is None or len(self.batches) < 2:
            return None
        order = shuffle_indices(whole.size)
        mixed = join_batches([whole.rows(index, index + 1) for index in order])
        return order, tuple(_cut(mixed, self.batch_size))

    def first(self, samples: int) -> tuple[Batch, ...]:
        """Return the batches that hold the first samples."""
        chosen, count = [], 0
        for batch in self.batches:
            if count >= samples:
                break
            chosen.append(batch)
            count += batch.size
        return tuple(chosen)

    def order(self, size: int | None = None) -> BatchOrder | None:
        """Return how far the batches differ from one another; None if unknown.

        Args:
            size: Samples in each of the parts that are compared; None for batches as they come.
        """
        if size is not None and self.must_be_joined(size) and self.whole is None:
            return None
        inputs = [
            next((t for t in batch.tensors() if _has_rows_of_numbers(t)), None)
            for batch in (self.batches if size is None else self.of_size(size))
        ]
        parts = [
            [part]
            for values in inputs
            if values is not None
            for part in torch.split(values, size or max(1, len(values)))
        ]
        window = compare_batches(parts)
        if window is None or window.batches < MIN_BATCHES:
            return None
        ratio = usual_ratio(window)
        return None if math.isinf(ratio) else BatchOrder(ratio, window.batches)


@dataclass(frozen=True)
class BatchOrder:
    """Whether the samples of a batch are more alike than those of different batches.

    Attributes:
        variance_ratio: The variance between batches over that of independent samples, 1 if the
            samples are shuffled: the F ratio of an analysis of variance.
        batches: Batches that were compared.
    """

    variance_ratio: float
    batches: int

    @property
    def limit(self) -> float:
        """The limit that independent samples stay below; see BN203."""
        return max(2.0, 1.0 + 5.0 * math.sqrt(2.0 / (self.batches - 1)))

    def __str__(self) -> str:
        return (
            f"differ {self.variance_ratio:.3g} times as much as independent samples "
            f"(limit {self.limit:.2g})"
        )

    @property
    def is_sorted(self) -> bool:
        """Whether chance does not explain how far the batches differ."""
        return self.variance_ratio > self.limit


def read_samples(
    loader: Iterable[object],
    model: nn.Module,
    forward: Forward | None,
    *,
    samples: int,
    device: torch.device,
    name: str,
) -> Samples:
    """Read the first samples of a loader, and keep them.

    Raises:
        CalibrationError: The loader is empty, or the model does not take its batches.
    """
    batches = tuple(read_batches(loader, model, forward, samples=samples, device=device))
    if not batches:
        raise CalibrationError(
            f"the {name} is empty: an iterator that can be read only once may have been read"
        )
    return Samples(batches)


def copy_batch(batch: Batch) -> Batch:
    """Return a copy for a forward, which may write to it.

    All objects in it are copied, and not only tensors as by :meth:`Batch.copied`.
    """
    inputs = (batch.args, batch.kwargs)
    # A deep copy fails on nested and compressed sparse tensors, and on those with a history.
    clones = {id(leaf): leaf.clone() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
    args, kwargs = copy.deepcopy(inputs, clones)
    return Batch(batch.index, args, kwargs, batch.size)


def _has_rows_of_numbers(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and is_dense(tensor) and tensor.dim() > 1


def _cut(batch: Batch, size: int) -> Iterator[Batch]:
    """Yield parts of at least this size; the last takes the remainder."""
    count = max(1, batch.size // size)
    for number in range(count):
        stop = batch.size if number == count - 1 else (number + 1) * size
        yield batch.rows(number * size, stop)
