"""Batch statistics of all layers, each read where it costs least: off its buffers, or at its calls.

What is read is kept in windows of steps, which the layers are judged by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from bnguard.history import BatchWindow, EvalWindow
from bnguard.layers import BatchNormLayer
from bnguard.probes.buffers import BufferProbe, imprecision
from bnguard.probes.hooks import Hooks
from bnguard.probes.inputs import InputProbe
from bnguard.probes.row import BufferReading

_Window = TypeVar("_Window", BatchWindow, EvalWindow)


class BatchProbe:
    """Reads the batch statistics of all layers, and keeps the newest window that is full.

    Args:
        layers: The layers to read; those without running statistics are left out.
        restore_poisoned: Put the last finite statistics back in the step that poisons them.
    """

    def __init__(self, layers: Iterable[BatchNormLayer], *, restore_poisoned: bool) -> None:
        self._layers = tuple(layers)
        self._buffers = BufferProbe(self._layers, restore_poisoned=restore_poisoned)
        self._calls = InputProbe(())
        self._reasons: dict[str, str] = {}
        self._repeats: Mapping[str, int] = {}
        self._full_windows: dict[str, BatchWindow] = {}

    @property
    def hooks(self) -> Hooks:
        """Those on the layers that are read from their calls."""
        return self._calls.hooks

    def read(self, step: int) -> None:
        """Read what the training step just taken, number ``step``, left in the buffers."""
        self._buffers.read(step)

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Read these layers from now on; what was read of them so far is kept."""
        self._layers = tuple(layers)
        self._buffers.follow(self._layers)
        self._full_windows = fitting(self._full_windows, self._layers)
        self._read_from_calls({})

    def choose_sources(self, repeats: Mapping[str, int]) -> None:
        """Read layers from their calls where their buffers do not tell their batches.

        Args:
            repeats: How often each layer, by name, meets a batch.
        """
        if repeats != self._repeats:
            self._repeats = repeats
            self._buffers.use_repeats(repeats)
        readings = self._buffers.readings()
        reasons = {}
        for layer in self._layers:
            reading = readings.get(layer.name)
            reason = None if reading is None else imprecision(layer, reading.running.updates or 0)
            if reason is not None:
                reasons[layer.name] = reason
        if reasons.keys() != self._reasons.keys():
            self._read_from_calls(reasons)

    def source(self, layer: str) -> str:
        """Return where the batch statistics of a layer are read, and why not off its buffers."""
        reason = self._reasons.get(layer)
        return "buffers" if reason is None else f"{self._calls.place(layer)}: {reason}"

    def forget_changes(self) -> None:
        """Take the buffers as they are now, whatever changed them since the newest step."""
        self._buffers.forget_changes()

    def readings(self) -> dict[str, BufferReading]:
        """Return what was read, by layer name; the one place that waits for the device."""
        return self._buffers.readings()

    def start_window(self) -> None:
        """Begin a new window, and keep the one that ends as the newest full."""
        for name, reading in self._buffers.readings().items():
            if reading.window is not None:
                self._full_windows[name] = reading.window
        self._buffers.start_window()

    def resume(self, windows: Mapping[str, BatchWindow]) -> None:
        """Go on from the windows of an interrupted run, until newer ones are full.

        Those of layers that are others now are left out.
        """
        self._full_windows.update(fitting(windows, self._layers))

    def window(self, layer: str) -> BatchWindow | None:
        """Return a layer's newest window that holds at least half of the batches of a full one."""
        reading, full = self._buffers.readings().get(layer), self._full_windows.get(layer)
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
        self._reasons = reasons
        self._calls.hooks.close()
        self._calls = InputProbe(layer for layer in self._layers if layer.name in reasons)
        self._buffers.take_from(dict.fromkeys(reasons, self._calls))


def fitting(windows: Mapping[str, _Window], layers: Iterable[BatchNormLayer]) -> dict[str, _Window]:
    """Return the windows, by layer name, that have the channels that these layers have now."""
    channels = {layer.name: layer.channels for layer in layers}
    return {
        name: window for name, window in windows.items() if len(window.mean) == channels.get(name)
    }
