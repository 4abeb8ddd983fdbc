"""Batch statistics read at the calls of a layer, if its buffers do not show them.

What autograd saved for the backward costs next to nothing; reading the input does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import channel_moments, values_per_channel, wide
from bnguard.observe.history import Stream
from bnguard.observe.hooks import Hooks, Note
from bnguard.observe.layer_calls import ShapeProbe, is_recomputing

_NODES = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
# Calls of a layer in one step with an average of their own; further ones share the last.
_MAX_STREAMS = 4
# Calls of a stream that are read; later ones cost nothing.
_MAX_CALLS = 16


class InputProbe:
    """Averages the batch statistics of layers since they were last taken.

    Args:
        layers: The layers to read; only these pay for it.
    """

    def __init__(self, layers: Iterable[BatchNormLayer]) -> None:
        self.hooks = Hooks()
        self._records: dict[str, _Record] = {}
        for layer in layers:
            record = self._records[layer.name] = _Record()
            self.hooks.after(layer.module, _input_note(layer, record))

    @property
    def layers(self) -> Iterable[str]:
        """The names of the layers."""
        return self._records

    def take(self, layer: str) -> tuple[Tensor, int] | None:
        """Return the average since the last call, ``(2, C)``, and its batches; None without one."""
        record = self._records[layer]
        total, batches = record.total, record.batches
        record.total, record.batches = None, 0
        return None if total is None else (total / batches, batches)

    def place(self, layer: str) -> str:
        """Return where the statistics of a layer are read: ``"autograd"`` or ``"inputs"``."""
        record = self._records.get(layer)
        return "autograd" if record is not None and record.is_saved_by_autograd else "inputs"


@dataclass
class _Record:
    total: Tensor | None = None
    batches: int = 0
    is_saved_by_autograd: bool = False


def _input_note(layer: BatchNormLayer, record: _Record) -> Note:
    @torch.no_grad()
    def note(args: tuple[object, ...], output: object) -> None:
        if not (args and layer.uses_batch_statistics):
            return
        statistics = batch_statistics(layer, args[0], output)
        if statistics is not None:
            record.is_saved_by_autograd = saves_statistics(output)
            record.total = statistics if record.total is None else record.total + statistics
            record.batches += 1

    return note


class StreamProbe:
    """Averages the batch statistics of the first, second, … call of a layer in a step.

    Calls without gradients do not train the layer. They are not a stream and have their own
    average.

    Args:
        shapes: Counts the calls of a step.
    """

    def __init__(self, shapes: ShapeProbe) -> None:
        self.hooks = Hooks()
        self._shapes = shapes
        self._streams: dict[str, _Streams] = {}

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Read these layers as well, until enough calls of each are known."""
        for layer in layers:
            if layer.name not in self._streams:
                streams = self._streams[layer.name] = _Streams()
                self.hooks.after(layer.module, _stream_note(layer, self._shapes, streams))

    def streams(self, layer: str) -> tuple[Stream, ...]:
        """Return the averages of the first, second, … call of a layer in a step."""
        averages = self._streams.get(layer, _Streams()).averages
        return tuple(stream for average in averages for stream in average.stream())

    def without_grad(self, layer: str) -> Stream | None:
        """Return the average of the calls under ``torch.no_grad``."""
        return next(self._streams.get(layer, _Streams()).without_grad.stream(), None)


@dataclass
class _Average:
    """The average of batch means and unbiased variances, shape ``(2, C)``.

    By Welford, "Note on a method for calculating corrected sums of squares and products" (1962).
    """

    batches: int = 0
    value: Tensor | None = None
    squares: Tensor | None = None

    def add(self, statistics: Tensor) -> None:
        self.batches += 1
        if self.value is None or self.squares is None:
            self.value, self.squares = statistics, torch.zeros_like(statistics)
            return
        step = statistics - self.value
        self.value = self.value + step / self.batches
        self.squares = self.squares + step * (statistics - self.value)

    def stream(self) -> Iterator[Stream]:
        """Yield the average with its standard error, from the differences of batches, if any."""
        if self.value is None or self.squares is None:
            return
        mean, var = self.value.cpu().numpy()
        error = (self.squares / max(self.batches - 1, 1) / self.batches).sqrt()
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


def _stream_note(layer: BatchNormLayer, shapes: ShapeProbe, streams: _Streams) -> Note:
    usual_momentum, record = layer.momentum, shapes.records[layer.name]

    def note(args: tuple[object, ...], output: object) -> None:
        if not (args and layer.uses_batch_statistics) or is_recomputing():
            return
        # Estimating the statistics again sets another momentum.
        if layer.momentum != usual_momentum:
            return
        # Activations that the backward computes again run under no_grad first.
        has_grad = torch.is_grad_enabled() or record.calls.recomputed > 0
        average = streams.next(shapes.step) if has_grad else streams.without_grad
        if average is not None and average.batches < _MAX_CALLS:
            with torch.no_grad():
                statistics = batch_statistics(layer, args[0], output)
                if statistics is not None:
                    average.add(statistics)

    return note


def batch_statistics(layer: BatchNormLayer, value: object, output: object) -> Tensor | None:
    """Return mean and unbiased variance of a batch, ``(2, C)``; None if it is not one."""
    if not (isinstance(value, Tensor) and layer.normalises(value)):
        return None
    n = values_per_channel(value.shape)
    if n < 2:
        return None
    saved = saved_statistics(output, layer.eps)
    if saved is None:
        moments = channel_moments(value)
        return torch.stack([moments.mean, moments.var_unbiased])
    mean, var = saved
    return torch.stack([wide(mean), var * (n / (n - 1))])


def saved_statistics(output: object, eps: float) -> tuple[Tensor, Tensor] | None:
    """Return the batch mean and biased variance that a BN call saved for its backward, if any.

    >>> layer = torch.nn.BatchNorm1d(1)
    >>> mean, var = saved_statistics(layer(torch.tensor([[1.0], [5.0]])), layer.eps)
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
