"""Batch statistics read off the running buffers, for every layer at once, with no hook.

Nothing is copied to the host, and nothing waits for the device, until :meth:`BufferProbe.readings`
is called. How a batch is read off is told in :mod:`bnguard.probes.row`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch

from bnguard.layers import BatchNormLayer
from bnguard.probes.row import BatchSource, BufferReading, BufferRow

# Below this weight a batch leaves so little in float32 buffers that its mean would be off by more
# than 1e-4 of a running mean of its own size.
_MIN_WEIGHT = {torch.float32: 1e-3, torch.float64: 1e-10}


class BufferProbe:
    """Reads the batch statistics of all layers off their running buffers, once a step.

    Args:
        layers: The layers to read; those without running statistics are left out.
        restore_poisoned: Put the last finite statistics back in the step in which a mean or
            variance becomes NaN or infinite, a channel each.
    """

    def __init__(self, layers: Iterable[BatchNormLayer], *, restore_poisoned: bool = False) -> None:
        self._restore_poisoned = restore_poisoned
        self._carried: dict[str, BufferReading] = {}
        self._latest: dict[str, BufferReading] | None = None
        self._sources: Mapping[str, BatchSource] = {}
        self._repeats: Mapping[str, int] = {}
        self._layers = tuple(layers)
        self._rows = self._by_place()

    def read(self, step: int) -> None:
        """Read what the training step just taken, number ``step``, left in the buffers.

        A step in which buffers were replaced (moved, converted, loaded) tells nothing of them.
        """
        self._latest = None
        fresh = [row for row in self._rows if not row.is_stale()]
        for row in fresh:
            row.read(step, self._sources)
        if len(fresh) < len(self._rows):
            self.follow(self._layers)

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Read these layers from now on; what was read of them so far is kept."""
        self._carried = self.readings()
        self._latest = None
        self._layers = tuple(layers)
        self._rows = self._by_place()

    def take_from(self, sources: Mapping[str, BatchSource]) -> None:
        """Take the batch statistics of some layers, by name, from elsewhere than their buffers."""
        self._latest = None
        self._sources = sources

    def use_repeats(self, repeats: Mapping[str, int]) -> None:
        """Note how often layers meet each batch: more than once where activations are recomputed.

        This holds for the newest steps as well.
        """
        self._latest = None
        self._repeats = repeats
        for row in self._rows:
            row.use_repeats(repeats)

    def forget_changes(self) -> None:
        """Take the buffers as they are now as the old ones, whatever changed them."""
        self._latest = None
        if any(row.is_stale() for row in self._rows):
            self.follow(self._layers)
        for row in self._rows:
            row.take_as_old()

    def start_window(self) -> None:
        """Begin a new window of batch statistics."""
        self._latest = None
        for row in self._rows:
            row.start_window()

    def readings(self) -> dict[str, BufferReading]:
        """Return what was read, by layer name; the one place that waits for the device."""
        if self._latest is None:
            self._latest = {
                name: reading.after(self._carried.get(name))
                for row in self._rows
                for name, reading in row.readings().items()
            }
        return self._latest

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


def imprecision(layer: BatchNormLayer, updates: int) -> str | None:
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
