"""Batch statistics read off the running buffers, for every layer at once, with no hook.

In training PyTorch mixes the statistics of each batch into the running ones,
``new = (1 - a) * old + a * batch``, so the batch is ``old + (new - old) / a``. The weight ``a`` is
``momentum``, or ``1 / num_batches_tracked`` where momentum is None; where the counter rose by k in
a step it is 1 - (1 - momentum)^k or k / num_batches_tracked, and ``batch`` is the average that
PyTorch itself made of the k batches. The variance is the unbiased one, as stored.

Nothing is copied to the host, and nothing waits for the device, until :meth:`BufferProbe.readings`
is called.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from bnguard.history import BatchWindow, RunningStatistics
from bnguard.layers import BatchNormLayer
from bnguard.probes.window import Window
from bnguard.stats import FloatArray

# Below this weight a batch leaves so little in float32 buffers that its mean would be off by more
# than 1e-4 of a running mean of its own size.
_MIN_WEIGHT = {torch.float32: 1e-3, torch.float64: 1e-10}


@dataclass(frozen=True, kw_only=True, eq=False)
class BufferReading:
    """What the buffers of one layer told.

    Attributes:
        running: The running statistics as they were at the last reading.
        updates: How often the statistics were updated since watching began.
        window: Batch statistics since the window was started; None where no batch was seen.
        poisoned_step: First step after which a running statistic was not finite.
        restored_updates: In how many steps statistics were put back, the most over the channels.
    """

    running: RunningStatistics
    updates: int
    window: BatchWindow | None
    poisoned_step: int | None
    restored_updates: int

    def after(self, earlier: BufferReading | None) -> BufferReading:
        """Return this reading as the continuation of one from before the buffers were replaced."""
        if earlier is None:
            return self
        steps = (earlier.poisoned_step, self.poisoned_step)
        return dataclasses.replace(
            self,
            updates=earlier.updates + self.updates,
            window=self.window or earlier.window,
            poisoned_step=next((step for step in steps if step is not None), None),
            restored_updates=earlier.restored_updates + self.restored_updates,
        )


class BatchSource(Protocol):
    """Where the batch statistics of a layer come from when its buffers do not tell them."""

    def take(self, layer: str) -> tuple[Tensor, int] | None:
        """Return what came since the last call; None where nothing did.

        That is the average of the means and of the unbiased variances, shape ``(2, C)``, and of
        how many batches it is one.
        """


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
        self._sources: Mapping[str, BatchSource] = {}
        self._step = 0
        self._layers = tuple(layers)
        self._groups = self._grouped()

    def read(self, step: int) -> None:
        """Read what the training step just taken, number ``step``, left in the buffers.

        A step in which buffers were replaced (moved, converted, loaded) tells nothing.
        """
        self._step = step
        if any(group.is_stale() for group in self._groups):
            self.follow(self._layers)
            return
        for group in self._groups:
            group.read(step, self._sources)

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Read these layers from now on; what was read of them so far is kept."""
        self._carried = self.readings()
        self._layers = tuple(layers)
        self._groups = self._grouped()

    def take_from(self, sources: Mapping[str, BatchSource]) -> None:
        """Take the batch statistics of some layers, by name, from elsewhere than their buffers."""
        self._sources = sources

    def forget_changes(self) -> None:
        """Take the buffers as they are now as the old ones, whatever changed them."""
        if any(group.is_stale() for group in self._groups):
            self.follow(self._layers)
        for group in self._groups:
            group.take_as_old()

    def start_window(self) -> None:
        """Begin a new window of batch statistics."""
        for group in self._groups:
            group.start_window(self._step + 1)

    def readings(self) -> dict[str, BufferReading]:
        """Return what was read, by layer name; the one place that waits for the device."""
        return {
            name: reading.after(self._carried.get(name))
            for group in self._groups
            for name, reading in group.readings(self._step).items()
        }

    def _grouped(self) -> list[_Group]:
        by_place: dict[tuple[object, ...], list[BatchNormLayer]] = defaultdict(list)
        for layer in self._layers:
            mean = layer.running_mean
            if mean is not None and layer.running_var is not None:
                by_place[mean.device, mean.dtype, layer.counter is None].append(layer)
        return [
            _Group(group, self._restore_poisoned, self._step + 1) for group in by_place.values()
        ]


def imprecision(layer: BatchNormLayer) -> str | None:
    """Return why the buffers of a layer do not tell its batches; None where they do.

    Reads the counter of a layer with ``momentum=None``, which waits for the device.
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
    if momentum is None and layer.counter is not None:
        batches = int(layer.counter)
        if batches * _MIN_WEIGHT[mean.dtype] > 1.0:
            return f"an average over {batches} batches leaves too few digits of the next"
    return None


class _Group:
    """The layers whose buffers share a device and a dtype, as one row of C channels in all."""

    def __init__(
        self, layers: list[BatchNormLayer], restore_poisoned: bool, first_step: int
    ) -> None:
        self._layers = layers
        self._restore_poisoned = restore_poisoned
        places = [list(layer.statistics()) for layer in layers]
        self._sources = [mean for mean, *_ in places] + [var for _, var, *_ in places]
        has_counters = layers[0].counter is not None
        self._counter_sources = [counter for _, _, counter in places] if has_counters else []
        self._buffers = self._current()
        self._sizes = [buffer.numel() for buffer in self._buffers]
        sizes = self._sizes[: len(layers)]
        edges = np.cumsum([0, *sizes])
        self._slices = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        self._index = {layer.name: index for index, layer in enumerate(layers)}

        first = self._buffers[0]
        self._device = first.device
        # Statistics of half-precision buffers are kept in float32.
        self._dtype = first.dtype if first.dtype in _MIN_WEIGHT else torch.float32
        self._layer_of_channel = torch.repeat_interleave(torch.tensor(sizes)).to(self._device)
        self._momenta: list[float | None] = []
        self._updates = torch.zeros(len(layers), dtype=torch.int64, device=self._device)
        self.take_as_old()
        self._poisoned_step = torch.full_like(self._old[0], -1.0)
        self._restored = torch.zeros_like(self._old[0])
        self.start_window(first_step)

    def is_stale(self) -> bool:
        """Whether the layers have other buffers now.

        A class without a counter may put a new tensor in place at each update; only one of another
        kind counts there.
        """
        current = self._current()
        if self._counter_sources:
            return not all(map(operator.is_, current, self._buffers))
        return any(
            (now.numel(), now.dtype, now.device) != (before.numel(), before.dtype, before.device)
            for now, before in zip(current, self._buffers, strict=True)
        )

    def start_window(self, first_step: int) -> None:
        self._window = Window(self._old[0], first_step)

    @torch.no_grad()
    def take_as_old(self) -> None:
        self._old = self._values()
        self._old_counters = self._counters()

    @torch.no_grad()
    def read(self, step: int, sources: Mapping[str, BatchSource]) -> None:
        old, new = self._old, self._values()
        counters = self._counters()
        rises = self._rises(counters, old, new)
        self._note_poison(step, old, new)
        weights, weight_squares = self._weights(rises, counters)
        batch = old + (new - old) / weights[self._layer_of_channel]
        self._put_in(batch, weight_squares, sources)
        self._window.add(batch, weight_squares[self._layer_of_channel])
        self._updates += rises
        self._old, self._old_counters = new, counters

    def readings(self, last_step: int) -> dict[str, BufferReading]:
        stacked = torch.stack([*self._old, self._poisoned_step, self._restored])
        rows = torch.cat([stacked, self._window.rows()]).double().cpu().numpy()
        counts = torch.stack([self._old_counters, self._updates]).cpu().numpy()
        return {
            layer.name: self._reading(
                rows[:, place], int(counts[0, index]), int(counts[1, index]), last_step
            )
            for index, (layer, place) in enumerate(zip(self._layers, self._slices, strict=True))
        }

    def _reading(
        self, rows: FloatArray, counter: int, updates: int, last_step: int
    ) -> BufferReading:
        mean, var, poisoned_step, restored = rows[:4]
        steps = poisoned_step[poisoned_step >= 0]
        return BufferReading(
            running=RunningStatistics(
                mean=mean, var=var, updates=counter if self._counter_sources else None
            ),
            updates=updates,
            window=self._window.reading(rows[4:], last_step),
            poisoned_step=int(steps.min()) if steps.size else None,
            restored_updates=int(restored.max(initial=0)),
        )

    def _current(self) -> list[Tensor]:
        return [holder[name] for holder, name in self._sources]

    def _values(self) -> Tensor:
        if not self._counter_sources:
            self._buffers = self._current()
        flat = [buffer if buffer.dim() == 1 else buffer.reshape(-1) for buffer in self._buffers]
        return torch.cat(flat).view(2, -1).to(self._dtype)

    def _counters(self) -> Tensor:
        if not self._counter_sources:
            return torch.zeros(len(self._layers), dtype=torch.int64, device=self._device)
        return torch.stack([holder[name] for holder, name in self._counter_sources])

    def _rises(self, counters: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Return how often each layer was updated; without a counter, whether it changed."""
        if self._counter_sources:
            return (counters - self._old_counters).clamp_min(0)
        changed = (old != new).any(0).long()
        return torch.zeros_like(counters).scatter_reduce(0, self._layer_of_channel, changed, "amax")

    def _weights(self, rises: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of the step's k batches in the running statistics, a layer each.

        And the sum of the squares of their weights among themselves, which is 1 for one batch:
        those of an exponential average are momentum * (1 - momentum)^i, those of a plain one equal.
        """
        momenta = [layer.momentum for layer in self._layers]
        if momenta != self._momenta:
            self._momenta = momenta
            values = [math.nan if momentum is None else momentum for momentum in momenta]
            self._momentum = torch.tensor(values, dtype=torch.float64, device=self._device)
        momentum, is_plain = self._momentum, self._momentum.isnan()
        kept = (1.0 - momentum) ** rises
        weights = torch.where(is_plain, rises / counters.clamp_min(1), 1.0 - kept)
        exponential = momentum * (1.0 + kept) / ((2.0 - momentum) * (1.0 - kept))
        squares = torch.where(is_plain, 1.0 / rises, exponential)
        return weights.to(self._dtype), squares.to(self._dtype)

    def _put_in(
        self, batch: Tensor, weight_squares: Tensor, sources: Mapping[str, BatchSource]
    ) -> None:
        """Put in the statistics of the layers that are read elsewhere; NaN where none came."""
        for name, source in sources.items():
            index = self._index.get(name)
            if index is None:
                continue
            values, batches = source.take(name) or (torch.tensor(math.nan), 1)
            batch[:, self._slices[index]] = values.to(batch)
            weight_squares[index] = 1.0 / batches

    def _note_poison(self, step: int, old: Tensor, new: Tensor) -> None:
        """Remember where statistics are not finite, and put the old ones back if asked to."""
        bad = ~torch.isfinite(new).all(0)
        self._poisoned_step.masked_fill_(bad & (self._poisoned_step < 0), step)
        if not self._restore_poisoned:
            return
        bad &= torch.isfinite(old).all(0)
        # On a CPU the question costs nothing; elsewhere it would wait for the device, so that
        # writing back what is there is cheaper.
        if self._device.type == "cpu" and not bool(bad.any()):
            return
        self._restored += bad
        torch.where(bad, old, new, out=new)
        # .data: a version counter that moved would break a backward that still needs the buffers.
        for buffer, values in zip(
            self._buffers, torch.split(new.view(-1), self._sizes), strict=True
        ):
            buffer.data.copy_(values.view_as(buffer))
