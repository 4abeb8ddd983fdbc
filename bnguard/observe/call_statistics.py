"""Batch statistics read at the calls of layers.

What autograd saved for the backward costs next to nothing; reading the input does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import channel_moments, values_per_channel, wide
from bnguard.observe.history import Stream
from bnguard.observe.hooks import Hooks
from bnguard.observe.layer_calls import ShapeProbe, is_recomputing

_NODES = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
# Calls of a layer in one step with an average of their own; further ones share the last.
_MAX_STREAMS = 4
# Calls of a stream that are read; later ones cost nothing.
_MAX_CALLS = 16


class InputProbe:
    """Averages the batch statistics of layers since they were last taken; only these pay for it."""

    def __init__(self, layers: Iterable[BatchNormLayer]) -> None:
        self.hooks = Hooks()
        self._averages: dict[str, _Average] = {}
        self._places: dict[str, str] = {}
        for layer in layers:
            self._averages[layer.name] = _Average()
            self.hooks.after(layer.module, partial(self._note, layer))

    def take(self) -> dict[str, tuple[Tensor, int]]:
        """Return the average since the last call, ``(2, C)``, and its batches; NaN without one."""
        taken, self._averages = self._averages, {name: _Average() for name in self._averages}
        return {
            name: (torch.tensor(math.nan), 1)
            if average.value is None
            else (average.value, average.batches)
            for name, average in taken.items()
        }

    def place(self, layer: str) -> str:
        """Return where the statistics of a layer are read: ``"autograd"`` or ``"inputs"``."""
        return self._places.get(layer, "inputs")

    def _note(self, layer: BatchNormLayer, args: tuple[object, ...], output: object) -> None:
        statistics = batch_statistics(layer, args, output)
        if statistics is not None:
            self._places[layer.name] = "autograd" if saves_statistics(output) else "inputs"
            self._averages[layer.name].add(statistics)


class StreamProbe:
    """Averages the batch statistics of the first, second, … call of a layer in a step.

    Calls without gradients do not train the layer. They are not a stream and have their own
    average.
    """

    def __init__(self, shapes: ShapeProbe) -> None:
        self.hooks = Hooks()
        self._shapes = shapes
        self._streams: dict[str, _Streams] = {}

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Read these layers as well, until enough calls of each are known."""
        for layer in layers:
            if layer.name not in self._streams:
                streams = self._streams[layer.name] = _Streams(layer.momentum)
                self.hooks.after(layer.module, partial(self._note, layer, streams))

    def streams(self, layer: str) -> tuple[Stream, ...]:
        """Return the averages of the first, second, … call of a layer in a step."""
        streams = self._streams.get(layer)
        averages = () if streams is None else streams.averages
        return tuple(stream for average in averages for stream in average.stream())

    def without_grad(self, layer: str) -> Stream | None:
        """Return the average of the calls under ``torch.no_grad``."""
        streams = self._streams.get(layer)
        return None if streams is None else next(streams.without_grad.stream(), None)

    def _note(
        self, layer: BatchNormLayer, streams: _Streams, args: tuple[object, ...], output: object
    ) -> None:
        # Estimating the statistics again sets another momentum.
        is_estimating = layer.momentum != streams.usual_momentum
        if is_estimating or is_recomputing() or not (args and layer.uses_batch_statistics):
            return
        # Activations that the backward computes again run under no_grad first.
        recomputed = self._shapes.records[layer.name].calls.recomputed
        has_grad = torch.is_grad_enabled() or recomputed > 0
        average = streams.next(self._shapes.step) if has_grad else streams.without_grad
        if average is not None and average.batches < _MAX_CALLS:
            statistics = batch_statistics(layer, args, output)
            if statistics is not None:
                average.add(statistics)


@dataclass
class _Average:
    """The average of batch means and unbiased variances, shape ``(2, C)``.

    By Welford, "Note on a method for calculating corrected sums of squares and products" (1962).
    """

    batches: int = 0
    value: Tensor | None = None
    squares: Tensor | float = 0.0

    @torch.no_grad()
    def add(self, statistics: Tensor) -> None:
        self.batches += 1
        if self.value is None:
            self.value = statistics
            return
        step = statistics - self.value
        self.value = self.value + step / self.batches
        self.squares = self.squares + step * (statistics - self.value)

    def stream(self) -> Iterator[Stream]:
        """Yield the average with its standard error, from the differences of batches, if any."""
        if self.value is None:
            return
        mean, var = self.value.cpu().numpy()
        squares = torch.zeros_like(self.value) + self.squares
        error = (squares / max(self.batches - 1, 1) / self.batches).sqrt()
        mean_error, var_error = error.cpu().numpy()
        yield Stream(
            mean=mean,
            var_unbiased=var,
            batches=self.batches,
            mean_error=mean_error,
            var_error=var_error,
        )


@dataclass
class _Streams:
    """The calls of a layer: those with gradients by their place in a step, and the others."""

    usual_momentum: float | None
    averages: list[_Average] = field(default_factory=list)
    without_grad: _Average = field(default_factory=_Average)
    step: int = 0
    calls: int = 0

    def next(self, step: int) -> _Average | None:
        """Count a call with gradients in this step and return its average.

        None beyond the last place: later calls would fill their average sooner than the others,
        with batches of an earlier time of the training.
        """
        if step != self.step:
            self.step, self.calls = step, 0
        place, self.calls = self.calls, self.calls + 1
        if place >= _MAX_STREAMS:
            return None
        if place == len(self.averages):
            self.averages.append(_Average())
        return self.averages[place]


@torch.no_grad()
def batch_statistics(
    layer: BatchNormLayer, args: tuple[object, ...], output: object
) -> Tensor | None:
    """Return mean and unbiased variance of a batch, ``(2, C)``; None if a call has none."""
    values = args[0] if args and layer.uses_batch_statistics else None
    if not (isinstance(values, Tensor) and layer.normalises(values)):
        return None
    n = values_per_channel(values.shape)
    if n < 2:
        return None
    saved = read_saved_statistics(output, layer.eps)
    if saved is None:
        moments = channel_moments(values)
        return torch.stack([moments.mean, moments.var_unbiased])
    mean, var = saved
    return torch.stack([wide(mean), var * (n / (n - 1))])


def read_saved_statistics(output: object, eps: float) -> tuple[Tensor, Tensor] | None:
    """Return the batch mean and biased variance that a BN call saved for its backward, if any.

    >>> layer = torch.nn.BatchNorm1d(1)
    >>> mean, var = read_saved_statistics(layer(torch.tensor([[1.0], [5.0]])), layer.eps)
    >>> round(mean.item(), 3), round(var.item(), 3)
    (3.0, 4.0)
    """
    if not saves_statistics(output):
        return None
    node = output.grad_fn
    return node._saved_result1, wide(node._saved_result2).pow(-2.0) - eps


def saves_statistics(output: object) -> TypeGuard[Any]:
    """Return whether a BN call saved statistics that are readable and precise enough.

    False without gradients, in a class that does more than normalise, in half precision, and under
    saved-tensor hooks, as with activation checkpointing.
    """
    node = getattr(output, "grad_fn", None)
    if node is None or type(node).__name__ not in _NODES:
        return False
    # Reading a packed tensor would unpack it: compute it again, or fetch it. Before torch 2.8,
    # nothing shows whether it is packed.
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top_hooks is None or top_hooks(False) is not None:
        return False
    mean = node._saved_result1
    return mean.dtype in (torch.float32, torch.float64) and mean.numel() > 0
