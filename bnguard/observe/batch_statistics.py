"""Batch statistics, read off the running buffers, or at the calls if the buffers are too coarse.

From buffers nothing is copied to the host, and nothing waits for the device, until
:meth:`BatchProbe.readings` is called; how: :mod:`bnguard.observe.running_buffers`. At a call, what
autograd saved for the backward costs next to nothing; reading the input does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import channel_moments, values_per_channel, wide
from bnguard.observe.history import BatchWindow, EvalWindow, Stream
from bnguard.observe.hooks import Hooks, Note
from bnguard.observe.layer_calls import ShapeProbe, is_recomputing
from bnguard.observe.running_buffers import BufferReading, BufferRow

_Window = TypeVar("_Window", BatchWindow, EvalWindow)
# With a smaller momentum, the mean of a batch read off float32 buffers would be off by more than
# 1e-4 of a running mean of its own size.
_MIN_WEIGHT = {torch.float32: 1e-3, torch.float64: 1e-10}
_NODES = ("NativeBatchNormBackward0", "CudnnBatchNormBackward0", "MiopenBatchNormBackward0")
# Calls of a layer in one step with an average of their own; further ones share the last.
_MAX_STREAMS = 4
# Calls of a stream that are read; later ones cost nothing.
_MAX_CALLS = 16


class BatchProbe:
    """Reads the batch statistics of all layers once a step, and keeps the newest full window.

    Args:
        layers: The layers; those without running statistics are ignored.
        restore_poisoned: Put the last finite statistics of a channel back in the step in which its
            mean or variance becomes NaN or infinite.
    """

    def __init__(self, layers: Iterable[BatchNormLayer], *, restore_poisoned: bool = False) -> None:
        self._layers = tuple(layers)
        self._restore_poisoned = restore_poisoned
        self._calls = InputProbe(())
        self._reasons: dict[str, str] = {}
        self._repeats: Mapping[str, int] = {}
        self._full_windows: dict[str, BatchWindow] = {}
        self._carried: dict[str, BufferReading] = {}
        self._latest: dict[str, BufferReading] | None = None
        self._rows = self._rows_by_place()

    @property
    def hooks(self) -> Hooks:
        """The hooks on layers that are read at their calls."""
        return self._calls.hooks

    def read(self, step: int) -> None:
        """Read the buffers after training step number ``step``.

        Buffers that were replaced in the step (moved, converted, loaded) are not read.
        """
        self._latest = None
        fresh = [row for row in self._rows if not row.is_stale()]
        at_calls = self._calls.take()
        for row in fresh:
            row.read(step, at_calls)
        if len(fresh) < len(self._rows):
            self._read_anew()

    def skip_to(self, step: int) -> None:
        """Go on from the buffers after a step, the first after several that were not read."""
        self._latest = None
        if any(row.is_stale() for row in self._rows):
            self._read_anew()
        for row in self._rows:
            row.skip_to(step)

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Read these layers from now on, and keep earlier readings of them."""
        self._layers = tuple(layers)
        self._read_anew()
        self._full_windows = fitting(self._full_windows, self._layers)
        self._read_from_calls({})

    def choose_sources(self, repeats: Mapping[str, int]) -> None:
        """Read layers at their calls if their buffers are too coarse.

        Args:
            repeats: Calls of each layer, by name, per batch: several if activations are recomputed.
                Applies to the newest steps too.
        """
        if repeats != self._repeats:
            self._latest = None
            self._repeats = repeats
            for row in self._rows:
                row.use_repeats(repeats)
        reasons = {}
        for layer in self._layers:
            reason = self._why_coarse(layer)
            if reason is not None:
                reasons[layer.name] = reason
        if reasons.keys() != self._reasons.keys():
            self._read_from_calls(reasons)

    def source(self, layer: str) -> str:
        """Return where the batch statistics of a layer are read, and the reason."""
        reason = self._reasons.get(layer)
        return "buffers" if reason is None else f"{self._calls.place(layer)}: {reason}"

    def forget_changes(self) -> None:
        """Do not count changes of the buffers so far as updates."""
        self._latest = None
        if any(row.is_stale() for row in self._rows):
            self._read_anew()
        for row in self._rows:
            row.take_as_old()

    def readings(self) -> dict[str, BufferReading]:
        """Return the readings by layer name; the one place that waits for the device."""
        if self._latest is None:
            self._latest = {
                name: reading.after(self._carried.get(name))
                for row in self._rows
                for name, reading in row.readings().items()
            }
        return self._latest

    def start_window(self) -> None:
        """Begin a new window and keep the old one as the newest full one."""
        for name, reading in self.readings().items():
            if reading.window is not None:
                self._full_windows[name] = reading.window
        self._latest = None
        for row in self._rows:
            row.start_window()

    def resume(self, windows: Mapping[str, BatchWindow]) -> None:
        """Continue from the windows of an interrupted run, for layers of the same size."""
        self._full_windows.update(fitting(windows, self._layers))

    def window(self, layer: str) -> BatchWindow | None:
        """Return a layer's newest window with at least half the batches of a full one."""
        reading, full = self.readings().get(layer), self._full_windows.get(layer)
        newest = None if reading is None else reading.window
        if newest is None or full is None:
            return newest or full
        return newest if 2 * newest.batches.max() >= full.batches.max() else full

    def windows(self) -> dict[str, BatchWindow]:
        """Return the window of each layer that has one."""
        windows = {layer.name: self.window(layer.name) for layer in self._layers}
        return {name: window for name, window in windows.items() if window is not None}

    def _why_coarse(self, layer: BatchNormLayer) -> str | None:
        """Return why batches cannot be read off the buffers of a layer; None if they can."""
        mean, momentum = layer.running_mean, layer.momentum
        if mean is None or mean.is_meta or layer.running_var is None:
            return None
        if mean.dtype not in _MIN_WEIGHT:
            return f"{str(mean.dtype).removeprefix('torch.')} buffers are too coarse"
        if momentum == 0.0:
            return "momentum 0 keeps nothing of a batch"
        if momentum is not None and momentum < _MIN_WEIGHT[mean.dtype]:
            return f"momentum {momentum:g} leaves too few digits of a batch"
        if momentum is None and mean.dtype is torch.float32:
            reading = self.readings().get(layer.name)
            if reading is not None and (reading.running.updates or 0) > 1000:
                return "an average over more than 1,000 batches leaves too few digits of the next"
        return None

    def _read_from_calls(self, reasons: dict[str, str]) -> None:
        """Read the layers with these names at their calls, for these reasons."""
        self._latest = None
        self._reasons = reasons
        self._calls.hooks.close()
        self._calls = InputProbe(layer for layer in self._layers if layer.name in reasons)

    def _read_anew(self) -> None:
        """Continue with the current buffers of the layers, and keep earlier readings."""
        self._carried = self.readings()
        self._latest = None
        self._rows = self._rows_by_place()

    def _rows_by_place(self) -> list[BufferRow]:
        by_place: dict[tuple[object, ...], list[BatchNormLayer]] = defaultdict(list)
        for layer in self._layers:
            mean = layer.running_mean
            if mean is not None and layer.running_var is not None and not mean.is_meta:
                by_place[mean.device, mean.dtype, layer.counter is None].append(layer)
        return [
            BufferRow(layers, repeats=self._repeats, restore_poisoned=self._restore_poisoned)
            for layers in by_place.values()
        ]


def fitting(windows: Mapping[str, _Window], layers: Iterable[BatchNormLayer]) -> dict[str, _Window]:
    """Return the windows, by layer name, with as many channels as these layers have."""
    channels = {layer.name: layer.channels for layer in layers}
    return {
        name: window for name, window in windows.items() if len(window.mean) == channels.get(name)
    }


class InputProbe:
    """Averages the batch statistics of layers since they were last taken; only these pay for it."""

    def __init__(self, layers: Iterable[BatchNormLayer]) -> None:
        self.hooks = Hooks()
        self._records: dict[str, _Record] = {}
        for layer in layers:
            record = self._records[layer.name] = _Record()
            self.hooks.after(layer.module, _input_note(layer, record))

    def take(self) -> dict[str, tuple[Tensor, int]]:
        """Return the average since the last call, ``(2, C)``, and its batches; NaN without one."""
        taken = {}
        for name, record in self._records.items():
            average = torch.tensor(math.nan) if record.total is None else record.total
            taken[name] = average / max(record.batches, 1), max(record.batches, 1)
            record.total, record.batches = None, 0
        return taken

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
