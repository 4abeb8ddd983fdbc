"""How a layer gets its statistics once all that arrives at it is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bnguard.layers.moments import Moments, merge_moments
from bnguard.recalibration.calibration import Job
from bnguard.recalibration.layer_inputs import is_finite
from bnguard.recalibration.statistics import write_statistics

# What arrived at a layer: a rank each, by the number of the chunk on that rank.
Arrived = Sequence[Mapping[int, Moments]]


class NonFiniteError(Exception):
    """NaN or Inf arrives at a layer.

    Attributes:
        index: Index of the layer.
        chunks: Numbers of this rank's chunks that bring it; none where other ranks do.
    """

    def __init__(self, index: int, chunks: frozenset[int]) -> None:
        super().__init__(index, chunks)
        self.index = index
        self.chunks = chunks


class IrregularError(Exception):
    """The chunks cannot go through the layers side by side; says why."""


class PartingError(IrregularError):
    """Batches go other ways than those that they are joined to, so each has to go as it comes."""


def settle(job: Job, index: int, arrived: Arrived, samples: int) -> tuple[Moments, ...]:
    """Give a layer the statistics of all that arrived at it on all ranks; return the parts.

    Raises:
        NonFiniteError: On every rank, where NaN or Inf arrived on one.
        CalibrationError: The layer cannot hold the statistics, or has too few values.
    """
    parts = tuple(moments for on_rank in arrived for moments in on_rank.values())
    merged = merge_moments(parts)
    if not is_finite(merged):
        mine = arrived[job.ranks.rank]
        bad = frozenset(number for number, moments in mine.items() if not is_finite(moments))
        raise NonFiniteError(index, bad)
    layer = job.layers[index]
    estimate = job.estimate(layer, merged, samples)
    write_statistics(layer, estimate.mean, estimate.var)
    return parts
