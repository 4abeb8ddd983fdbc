"""Read the inputs of BN layers in a forward, and set statistics from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments, channel_moments, merge_moments, wide
from bnguard.recalibration.statistics import Job, write_statistics

OnInput = Callable[[int, Tensor], None]


@contextmanager
def read_inputs(layers: Sequence[BatchNormLayer], on_input: OnInput) -> Iterator[None]:
    """Call ``on_input`` with the index of a layer and its input, at each call of the layer.

    The hooks run after those that are already there, and so see what the layer sees.
    """
    handles = [
        layer.module.register_forward_pre_hook(_hook(index, on_input), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_moments(values: Tensor) -> Moments:
    """Return the moments of the inputs of a layer; they are finite if the inputs are.

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
    """Return the moments on the CPU, where parts are merged and exchanged."""
    return Moments(moments.count, moments.mean.cpu().double(), moments.squares.cpu().double())


def _hook(index: int, on_input: OnInput) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        on_input(index, args[0] if args else next(iter(kwargs.values())))

    return hook


# Moments of the inputs of a layer: one entry a rank, by the number of the chunk on that rank.
InputsOfRanks = Sequence[Mapping[int, Moments]]


class NonFiniteError(Exception):
    """There is NaN or Inf in the inputs of a layer.

    Attributes:
        index: Index of the layer.
        chunks: Numbers of this rank's chunks that bring it; none if only other ranks do.
    """

    def __init__(self, index: int, chunks: frozenset[int]) -> None:
        super().__init__(index, chunks)
        self.index = index
        self.chunks = chunks


class IrregularError(Exception):
    """The chunks cannot go through the layers side by side; says why."""


class DivergingError(IrregularError):
    """Batches call other layers than those they are joined to, so each has to run alone."""


def set_statistics(
    job: Job, index: int, inputs: InputsOfRanks, samples: int
) -> tuple[Moments, ...]:
    """Give a layer the statistics of its inputs on all ranks; return their moments in parts.

    Raises:
        NonFiniteError: On every rank, if there is NaN or Inf in the inputs of one.
        CalibrationError: The layer cannot hold the statistics, or has too few values.
    """
    parts = tuple(moments for on_rank in inputs for moments in on_rank.values())
    merged = merge_moments(parts)
    if not is_finite(merged):
        mine = inputs[job.ranks.rank]
        bad = frozenset(number for number, moments in mine.items() if not is_finite(moments))
        raise NonFiniteError(index, bad)
    layer = job.layers[index]
    estimate = job.estimate(layer, merged, samples)
    write_statistics(layer, estimate.mean, estimate.var)
    return parts
