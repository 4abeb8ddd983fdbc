"""What one batch alone does in a model: which layers it calls, and what arrives there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bnguard.layers.moments import Moments, merge_moments
from bnguard.layers.randomness import seeded
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.calibration import Job
from bnguard.recalibration.layer_inputs import arrivals, arrived_moments

# What other samples have a part in is off by far more.
_SAME = 0.05
# In half precision too, something must be left that counts as another value.
_MAX_NOISE = 0.3


def everything(values: Tensor) -> Tensor:
    """Return all rows of what arrives at a layer."""
    return values


@dataclass(frozen=True, eq=False)
class Observation:
    """What one batch did in a model.

    Attributes:
        calls: Indices of the layers, in the order in which they were called.
        moments: Moments of what arrived, all calls of a layer together, by index.
        starts_threads: Whether a layer was called in a thread that the model started.
        draws_random: Whether the forward drew random numbers from PyTorch.
    """

    calls: tuple[int, ...]
    moments: Mapping[int, Moments]
    starts_threads: bool
    draws_random: bool


def observe(
    job: Job, batch: Batch, look_at: Callable[[Tensor], Tensor] = everything
) -> Observation:
    """Put a batch through the model with the statistics that it has now, and nothing in its way.

    The random numbers that the forward draws are the same each time.

    Args:
        job: Whose model it is.
        batch: The batch.
        look_at: Picks the rows to look at from what arrives at a layer.
    """
    calls: list[int] = []
    arrived: dict[int, list[Moments]] = {}
    threads = {threading.get_ident()}

    def arrive(index: int, values: Tensor) -> None:
        threads.add(threading.get_ident())
        calls.append(index)
        arrived.setdefault(index, []).append(arrived_moments(look_at(values)))

    with seeded(batch.index, job.device) as stream, arrivals(job.layers, arrive):
        job.run(batch)
    return Observation(
        calls=tuple(calls),
        moments={index: merge_moments(parts) for index, parts in arrived.items()},
        starts_threads=len(threads) > 1,
        draws_random=not stream.is_untouched,
    )


def disturbed_layers(
    job: Job, alone: Mapping[int, Moments], beside: Mapping[int, Moments]
) -> set[int]:
    """Return the indices of the layers at which samples meet something else beside others.

    A single value a channel has no spread to tell what is little, so that here what rounding may
    do counts in full, and not as a share of the tolerance.
    """
    return differing_layers(alone, beside, _SAME, min(job.noise / _SAME, _MAX_NOISE))


def differing_layers(
    first: Mapping[int, Moments], second: Mapping[int, Moments], tolerance: float, noise: float
) -> set[int]:
    """Return the indices of the layers at which not the same arrived.

    Args:
        first: What arrived at each layer, by its index.
        second: The same of another forward.
        tolerance: How far means may differ in standard deviations, and variances in themselves.
        noise: How far they may besides, as a share of what is usual in the layer, since sums in
            another order come out a little different.
    """
    everywhere = first.keys() & second.keys()
    differing = set(first.keys() ^ second.keys())
    return differing | {
        index for index in everywhere if not _is_same(first[index], second[index], tolerance, noise)
    }


def _is_same(first: Moments, second: Moments, tolerance: float, noise: float) -> bool:
    if first.count != second.count:
        return False
    means = first.mean.cpu().numpy(), second.mean.cpu().numpy()
    variances = first.var_biased.cpu().numpy(), second.var_biased.cpu().numpy()
    usual = np.sqrt(np.mean(np.square(means[0]) + variances[0]))
    scale = np.sqrt(variances[0]) + noise * usual + np.finfo(np.float64).tiny
    return np.allclose(
        means[0] / scale, means[1] / scale, rtol=0.0, atol=tolerance, equal_nan=True
    ) and np.allclose(
        variances[0] / scale**2, variances[1] / scale**2, rtol=0.0, atol=tolerance, equal_nan=True
    )
