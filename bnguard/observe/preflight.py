"""What is known of a training before its first batch, as plain data; imports no torch."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What loader, trainer and launcher say of a training before its first batch.

    Attributes:
        batch_size: Samples a batch on this rank; None where not known.
        samples: Samples an epoch on this rank; None where not known.
        drops_last: Whether the last, smaller batch of an epoch is left out.
        ranks: How many processes train together.
        accumulated_batches: Batches whose gradients are added before a step of the optimizer.
    """

    batch_size: int | None = None
    samples: int | None = None
    drops_last: bool = False
    ranks: int = 1
    accumulated_batches: int = 1

    @property
    def last_batch_size(self) -> int | None:
        """Samples in the last batch of an epoch; None where not known.

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
        """Samples in the smallest batch of an epoch; None where not known."""
        return self.batch_size if self.last_batch_size is None else self.last_batch_size


def plan_training(
    loader: object | None = None, *, ranks: int = 1, accumulated_batches: int = 1
) -> Plan:
    """Return what a loader says about its batches, without drawing one.

    The sampler knows the share of a rank; a batch sampler of the user's own knows its own sizes,
    and nothing is assumed of it.

    Args:
        loader: A ``DataLoader``, or anything with its attributes; others say nothing.
        ranks: How many processes train together.
        accumulated_batches: Batches whose gradients are added before a step of the optimizer.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> plan_training(DataLoader(range(65), batch_size=32)).last_batch_size
        1
    """
    batches = getattr(loader, "batch_sampler", None)
    batch_size = getattr(batches, "batch_size", None)
    if type(batches).__name__ != "BatchSampler" or not isinstance(batch_size, int):
        return Plan(ranks=ranks, accumulated_batches=accumulated_batches)
    return Plan(
        batch_size=batch_size,
        samples=_length(getattr(batches, "sampler", None)),
        drops_last=bool(getattr(batches, "drop_last", False)),
        ranks=ranks,
        accumulated_batches=accumulated_batches,
    )


def _length(sampler: object) -> int | None:
    """Return how many samples a sampler draws; None where it cannot tell."""
    if not isinstance(sampler, Sized):
        return None
    try:
        return len(sampler)
    except Exception:  # a sampler of the user's own may raise whatever it likes
        return None
