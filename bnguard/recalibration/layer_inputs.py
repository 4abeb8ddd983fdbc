"""What arrives at BN layers, read in a forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments, channel_moments, merge_moments, wide
from bnguard.recalibration.statistics import Job, write_statistics

Arrive = Callable[[int, Tensor], None]


@contextmanager
def arrivals(layers: Sequence[BatchNormLayer], arrive: Arrive) -> Iterator[None]:
    """Call ``arrive`` with the index of a layer and the values that are about to enter it.

    The hooks come after those that are there already, and so see what the layer sees.
    """
    handles = [
        layer.module.register_forward_pre_hook(_hook(index, arrive), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def arrived_moments(values: Tensor) -> Moments:
    """Return the moments of what arrives at a layer, not finite only where the values are not.

    Finite values whose squares are too large for their dtype are computed again in float64.
    """
    moments = channel_moments(values)
    if not is_finite(moments) and bool(torch.isfinite(values).all()):
        return channel_moments(wide(values))
    return moments


def is_finite(moments: Moments) -> bool:
    """Return whether mean and variance are finite in every channel."""
    return bool((moments.mean + moments.squares).isfinite().all())


def on_host(moments: Moments) -> Moments:
    """Return the moments in the memory of the host, where parts are merged and exchanged."""
    return Moments(moments.count, moments.mean.cpu().double(), moments.squares.cpu().double())


def _hook(index: int, arrive: Arrive) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrive(index, args[0] if args else next(iter(kwargs.values())))

    return hook


# How a layer gets its statistics once all that arrives at it is known.


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
