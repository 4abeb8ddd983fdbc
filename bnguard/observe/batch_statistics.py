"""Batch statistics of all layers, each read where it costs least: off its buffers, or at its calls.

Nothing is copied to the host, and nothing waits for the device, until :meth:`BatchProbe.readings`
is called. How a batch is read off the buffers: :mod:`bnguard.observe.running_buffers`. Layers whose
buffers do not tell their batches are read at their calls, and so are those that are called several
times a step, to tell their streams apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import channel_moments, values_per_channel, wide
from bnguard.observe.history import BatchWindow, EvalWindow, Stream
from bnguard.observe.hooks import Hooks, Note
from bnguard.observe.layer_calls import (
    ShapeProbe,
    is_recomputing,
    saved_statistics,
    saves_statistics,
)
from bnguard.observe.running_buffers import BufferReading, BufferRow

_Window = TypeVar("_Window", BatchWindow, EvalWindow)
# Below this weight a batch leaves so little in float32 buffers that its mean would be off by more
# than 1e-4 of a running mean of its own size.
_MIN_WEIGHT = {torch.float32: 1e-3, torch.float64: 1e-10}
# Calls of a layer in one step that are told apart; further ones share the last.
_MAX_STREAMS = 4
# Calls of a stream that are read; what comes later costs nothing.
_MAX_CALLS = 16


class BatchProbe:
    """Reads the batch statistics of all layers once a step, and keeps the newest full window.

    Args:
        layers: The layers to read; those without running statistics are left out.
        restore_poisoned: Put the last finite statistics back in the step in which a mean or
            variance becomes NaN or infinite, a channel each.
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
        self._rows = self._by_place()

    @property
    def hooks(self) -> Hooks:
        """Those on the layers that are read from their calls."""
        return self._calls.hooks

    def read(self, step: int) -> None:
        """Read what the training step just taken, number ``step``, left in the buffers.

        A step in which buffers were replaced (moved, converted, loaded) tells nothing of them.
        """
        self._latest = None
        sources = dict.fromkeys(self._reasons, self._calls)
        fresh = [row for row in self._rows if not row.is_stale()]
        for row in fresh:
            row.read(step, sources)
        if len(fresh) < len(self._rows):
            self._read_anew()

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Read these layers from now on; what was read of them so far is kept."""
        self._layers = tuple(layers)
        self._read_anew()
        self._full_windows = fitting(self._full_windows, self._layers)
        self._read_from_calls({})

    def choose_sources(self, repeats: Mapping[str, int]) -> None:
        """Read layers from their calls where their buffers do not tell their batches.

        Args:
            repeats: How often each layer, by name, meets a batch: more than once where activations
                are recomputed. This holds for the newest steps as well.
        """
        if repeats != self._repeats:
            self._latest = None
            self._repeats = repeats
            for row in self._rows:
                row.use_repeats(repeats)
        readings = self.readings()
        reasons = {}
        for layer in self._layers:
            reading = readings.get(layer.name)
            reason = None if reading is None else _imprecision(layer, reading.running.updates or 0)
            if reason is not None:
                reasons[layer.name] = reason
        if reasons.keys() != self._reasons.keys():
            self._read_from_calls(reasons)

    def source(self, layer: str) -> str:
        """Return where the batch statistics of a layer are read, and why not off its buffers."""
        reason = self._reasons.get(layer)
        return "buffers" if reason is None else f"{self._calls.place(layer)}: {reason}"

    def forget_changes(self) -> None:
        """Take the buffers as they are now as the old ones, whatever changed them."""
        self._latest = None
        if any(row.is_stale() for row in self._rows):
            self._read_anew()
        for row in self._rows:
            row.take_as_old()

    def readings(self) -> dict[str, BufferReading]:
        """Return what was read, by layer name; the one place that waits for the device."""
        if self._latest is None:
            self._latest = {
                name: reading.after(self._carried.get(name))
                for row in self._rows
                for name, reading in row.readings().items()
            }
        return self._latest

    def start_window(self) -> None:
        """Begin a new window, and keep the one that ends as the newest full."""
        for name, reading in self.readings().items():
            if reading.window is not None:
                self._full_windows[name] = reading.window
        self._latest = None
        for row in self._rows:
            row.start_window()

    def resume(self, windows: Mapping[str, BatchWindow]) -> None:
        """Go on from the windows of an interrupted run, until newer ones are full.

        Those of layers that are others now are left out.
        """
        self._full_windows.update(fitting(windows, self._layers))

    def window(self, layer: str) -> BatchWindow | None:
        """Return a layer's newest window that holds at least half of the batches of a full one."""
        reading, full = self.readings().get(layer), self._full_windows.get(layer)
        newest = None if reading is None else reading.window
        if newest is None or full is None:
            return newest or full
        return newest if 2 * newest.batches.max() >= full.batches.max() else full

    def windows(self) -> dict[str, BatchWindow]:
        """Return the window of each layer that has one."""
        windows = {layer.name: self.window(layer.name) for layer in self._layers}
        return {name: window for name, window in windows.items() if window is not None}

    def _read_from_calls(self, reasons: dict[str, str]) -> None:
        """Read the layers with these names from their calls, for these reasons."""
        self._latest = None
        self._reasons = reasons
        self._calls.hooks.close()
        self._calls = InputProbe(layer for layer in self._layers if layer.name in reasons)

    def _read_anew(self) -> None:
        """Go on with the buffers that the layers have now; what was read so far is kept."""
        self._carried = self.readings()
        self._latest = None
        self._rows = self._by_place()

    def _by_place(self) -> list[BufferRow]:
        by_place: dict[tuple[object, ...], list[BatchNormLayer]] = defaultdict(list)
        for layer in self._layers:
            mean = layer.running_mean
            if mean is not None and layer.running_var is not None and not mean.is_meta:
                by_place[mean.device, mean.dtype, layer.counter is None].append(layer)
        return [
            BufferRow(
                layers,
                repeats=self._repeats,
                restore_poisoned=self._restore_poisoned,
            )
            for layers in by_place.values()
        ]


class InputProbe:
    """Takes the statistics of each batch from the call of a layer, and not from its buffers.

    What autograd saved costs next to nothing; a look at the input where it saved nothing does.

    Args:
        layers: The layers to read; only these pay for it.
    """

    def __init__(self, layers: Iterable[BatchNormLayer]) -> None:
        self.hooks = Hooks()
        self._records: dict[str, _Record] = {}
        for layer in layers:
            record = self._records[layer.name] = _Record(Average())
            self.hooks.after(layer.module, _input_note(layer, record))

    def take(self, layer: str) -> tuple[Tensor, int] | None:
        """Return the average of the batches since the last call, and their number."""
        record = self._records[layer]
        value, batches = record.pending.value(), record.pending.batches
        record.pending = Average()
        return None if value is None else (value, batches)

    def place(self, layer: str) -> str:
        """Return where the statistics of a layer are read: ``"autograd"`` or ``"inputs"``."""
        record = self._records.get(layer)
        return "autograd" if record is not None and record.is_saved_by_autograd else "inputs"


class StreamProbe:
    """Averages the batch statistics of the first, second, … call of a layer in a step.

    Calls without gradients teach the layer nothing, so that they are no stream: they have an
    average of their own.

    Args:
        shapes: Counts the calls of a step.
    """

    def __init__(self, shapes: ShapeProbe) -> None:
        self.hooks = Hooks()
        self._shapes = shapes
        self._streams: dict[str, _Streams] = {}

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Read these layers as well, until enough was seen of each."""
        for layer in layers:
            if layer.name not in self._streams:
                streams = self._streams[layer.name] = _Streams()
                self.hooks.after(layer.module, _stream_note(layer, self._shapes, streams))

    def streams(self, layer: str) -> tuple[Stream, ...]:
        """Return the average statistics of the first, second, … call of a layer in a step."""
        averages = self._streams.get(layer, _Streams()).averages
        found = (_stream_of(average) for average in averages)
        return tuple(stream for stream in found if stream is not None)

    def without_grad(self, layer: str) -> Stream | None:
        """Return the average statistics of the calls under ``torch.no_grad``."""
        return _stream_of(self._streams.get(layer, _Streams()).without_grad)


def fitting(windows: Mapping[str, _Window], layers: Iterable[BatchNormLayer]) -> dict[str, _Window]:
    """Return the windows, by layer name, that have the channels that these layers have now."""
    channels = {layer.name: layer.channels for layer in layers}
    return {
        name: window for name, window in windows.items() if len(window.mean) == channels.get(name)
    }


@dataclass
class Average:
    """The average of batch statistics, mean and unbiased variance, shape ``(2, C)``."""

    batches: int = 0
    total: Tensor | None = None
    _centre: Tensor | None = None
    _squares: Tensor | None = None

    def add(self, statistics: Tensor) -> None:
        """Add those of one batch."""
        self.batches += 1
        self.total = statistics if self.total is None else self.total + statistics
        # Welford, "Note on a method for calculating corrected sums of squares and products" (1962).
        if self._centre is None or self._squares is None:
            self._centre, self._squares = statistics, torch.zeros_like(statistics)
        else:
            step = statistics - self._centre
            self._centre = self._centre + step / self.batches
            self._squares = self._squares + step * (statistics - self._centre)

    def value(self) -> Tensor | None:
        """Return the average; None of nothing."""
        return None if self.total is None else self.total / self.batches

    def error(self) -> Tensor | None:
        """Return the standard error of the average, from how batches differ; None for one batch."""
        if self._squares is None or self.batches < 2:
            return None
        return (self._squares / (self.batches - 1) / self.batches).sqrt()


def batch_statistics(layer: BatchNormLayer, value: object, output: object) -> Tensor | None:
    """Return mean and unbiased variance of a batch, ``(2, C)``; None for no batch."""
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


@dataclass
class _Record:
    pending: Average
    is_saved_by_autograd: bool = False


def _input_note(layer: BatchNormLayer, record: _Record) -> Note:
    @torch.no_grad()
    def note(args: tuple[object, ...], output: object) -> None:
        if not (args and layer.uses_batch_statistics):
            return
        statistics = batch_statistics(layer, args[0], output)
        if statistics is not None:
            record.is_saved_by_autograd = saves_statistics(output)
            record.pending.add(statistics)

    return note


def _imprecision(layer: BatchNormLayer, updates: int) -> str | None:
    """Return why the buffers of a layer, updated so often, do not tell its batches.

    None where they do.
    """
    mean, momentum = layer.running_mean, layer.momentum
    if mean is None:
        return None
    if mean.dtype not in _MIN_WEIGHT:
        return f"{str(mean.dtype).removeprefix('torch.')} buffers are too coarse"
    if momentum == 0.0:
        return "momentum 0 keeps nothing of a batch"
    if momentum is not None and momentum < _MIN_WEIGHT[mean.dtype]:
        return f"momentum {momentum:g} leaves too few digits of a batch"
    if momentum is None and mean.dtype is torch.float32 and updates > 1000:
        return "an average over more than 1,000 batches leaves too few digits of the next"
    return None


@dataclass
class _Streams:
    """The calls of a layer: those with gradients by their place in a step, and the others."""

    averages: list[Average] = field(default_factory=list)
    without_grad: Average = field(default_factory=Average)
    step: int = 0
    calls: int = 0

    def next(self, step: int) -> Average:
        """Count a call with gradients in this step, and return the average that it belongs to."""
        if step != self.step:
            self.step, self.calls = step, 0
        self.calls += 1
        place = min(self.calls, _MAX_STREAMS) - 1
        while len(self.averages) <= place:
            self.averages.append(Average())
        return self.averages[place]


def _stream_of(average: Average) -> Stream | None:
    value, error = average.value(), average.error()
    if value is None:
        return None
    mean, var = value.cpu().numpy()
    mean_error, var_error = (0.0, 0.0) if error is None else error.cpu().numpy()
    return Stream(
        mean=mean,
        var_unbiased=var,
        batches=average.batches,
        mean_error=mean_error,
        var_error=var_error,
    )


def _stream_note(layer: BatchNormLayer, shapes: ShapeProbe, streams: _Streams) -> Note:
    usual_momentum, record = layer.momentum, shapes.records[layer.name]

    @torch.no_grad()
    def note(args: tuple[object, ...], output: object, *, has_grad: bool) -> None:
        if not (args and layer.uses_batch_statistics) or is_recomputing():
            return
        # Those who estimate the statistics anew set another momentum for it.
        if layer.momentum != usual_momentum:
            return
        average = streams.next(shapes.step) if has_grad else streams.without_grad
        if average.batches >= _MAX_CALLS:
            return
        statistics = batch_statistics(layer, args[0], output)
        if statistics is not None:
            average.add(statistics)

    # What is computed again in the backward runs under no_grad at first.
    return lambda args, output: note(
        args, output, has_grad=torch.is_grad_enabled() or record.calls.recomputed > 0
    )
