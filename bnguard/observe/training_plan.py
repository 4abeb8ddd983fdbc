"""What loader, trainer and launcher say about a training before its first batch; without torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnguard.layers.distances import FloatArray


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a training, as loader, trainer and launcher give them; None if unknown.

    Attributes:
        batch_size: Samples per batch on this rank.
        samples: Samples per epoch on this rank.
        drops_last: Whether the last, smaller batch of an epoch is left out.
        ranks: Processes that train together.
        accumulated_batches: Batches per step of the optimizer.
        label_run: Mean number of samples of one label in a row, if the loader does not shuffle.
        shuffled_label_run: The same in a random order.
    """

    batch_size: int | None = None
    samples: int | None = None
    drops_last: bool = False
    ranks: int = 1
    accumulated_batches: int = 1
    label_run: float | None = None
    shuffled_label_run: float | None = None

    @property
    def last_batch_size(self) -> int | None:
        """Samples in the last batch of an epoch.

        >>> Plan(batch_size=32, samples=65).last_batch_size
        1
        >>> Plan(batch_size=32, samples=65, drops_last=True).last_batch_size
        32
        """
        if not self.batch_size or self.samples is None:
            return None
        if self.drops_last:
            return self.batch_size
        return self.samples % self.batch_size or min(self.batch_size, self.samples)

    @property
    def smallest_batch_size(self) -> int | None:
        """Samples in the smallest batch of an epoch."""
        return self.batch_size if self.last_batch_size is None else self.last_batch_size


def plan_training(
    loader: object | None = None, *, ranks: int = 1, accumulated_batches: int = 1
) -> Plan:
    """Return the plan of a training, without drawing a batch.

    The sampler knows the share of a rank. Nothing is assumed of a batch sampler of the user's own.

    Args:
        loader: A ``DataLoader``, or any object with its attributes.
        ranks: Processes that train together.
        accumulated_batches: Batches per step of the optimizer.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> plan_training(DataLoader(range(65), batch_size=32)).last_batch_size
        1
    """
    batches = getattr(loader, "batch_sampler", None)
    batch_size = getattr(batches, "batch_size", None)
    if type(batches).__name__ != "BatchSampler" or not isinstance(batch_size, int):
        return Plan(ranks=ranks, accumulated_batches=accumulated_batches)
    sampler = getattr(batches, "sampler", None)
    is_in_order = type(sampler).__name__ == "SequentialSampler"
    runs = _label_runs(sampler) if is_in_order else None
    return Plan(
        label_run=None if runs is None else runs[0],
        shuffled_label_run=None if runs is None else runs[1],
        batch_size=batch_size,
        samples=_length(sampler),
        drops_last=bool(getattr(batches, "drop_last", False)),
        ranks=ranks,
        accumulated_batches=accumulated_batches,
    )


def _length(sampler: object) -> int | None:
    """Return the number of samples that a sampler draws; None if it does not know."""
    try:
        return len(sampler)  # type: ignore[arg-type]
    except Exception:  # a sampler of the user's own may raise anything
        return None


def _label_runs(sampler: object) -> tuple[float, float] | None:
    """Return the mean length of runs of a label in a sampler's dataset, and in a random order.

    None if the dataset does not hold its labels as whole numbers in one array, one a sample.
    """
    try:
        labels = _labels(getattr(sampler, "data_source", None))
    except Exception:  # a dataset of the user's own may raise anything
        return None
    if labels is None or labels.ndim != 1 or labels.size < 2 or labels.dtype.kind not in "iub":
        return None
    # Graphs may have a label for each node.
    if labels.size != _length(sampler):
        return None
    shares = np.unique(labels, return_counts=True)[1] / labels.size
    other = 1.0 - float(np.square(shares).sum())
    if other == 0.0:
        return None
    return labels.size / (1 + np.count_nonzero(np.diff(labels))), 1.0 / other


def _labels(dataset: object) -> FloatArray | None:
    indices, inner = getattr(dataset, "indices", None), getattr(dataset, "dataset", None)
    if indices is not None and inner is not None:
        labels = _labels(inner)
        return None if labels is None else labels[np.asarray(indices)]
    for name in ("targets", "labels", "label", "y"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name))
    tensors: tuple[object, ...] = getattr(dataset, "tensors", ())
    return np.asarray(tensors[-1]) if len(tensors) > 1 else None
