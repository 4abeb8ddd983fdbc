"""Batch statistics, read off the running buffers, or at the calls if the buffers are too coarse.

From buffers (:mod:`bnguard.observe.running_buffers`) nothing is copied to the host, and nothing
waits for the device, until :meth:`BatchProbe.readings` is called. For the calls see
:mod:`bnguard.observe.call_statistics`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.observe.call_statistics import InputProbe
from bnguard.observe.history import BatchWindow, EvalWindow
from bnguard.observe.hooks import Hooks
from bnguard.observe.running_buffers import BufferReading, BufferRow

_Window = TypeVar("_Window", BatchWindow, EvalWindow)
# With a smaller momentum, the mean of a batch read off float32 buffers would be off by more than
# 1e-4 of a running mean of its own size.
_MIN_WEIGHT = {torch.float32: 1e-3, torch.float64: 1e-10}


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
