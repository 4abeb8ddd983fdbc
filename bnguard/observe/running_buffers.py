"""The running buffers of many layers as one row of channels, and the batches read off it.

In training PyTorch mixes the statistics of each batch into the running ones,
``new = (1 - a) * old + a * batch``, so the batch is ``old + (new - old) / a``. The weight ``a`` is
``momentum``, or ``1 / num_batches_tracked`` if momentum is None. If the counter rose by k in a
step, it is 1 - (1 - momentum)^k or k / num_batches_tracked, and ``batch`` is PyTorch's own average
of the k batches. The variance is the unbiased one, as stored.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.distances import FloatArray
from bnguard.layers.moments import wide, wide_dtype
from bnguard.observe.batch_window import Window
from bnguard.observe.history import BatchWindow, RunningStatistics

# Steps that are processed together, because small operations cost by their number: as many as fit
# in a part of a processor's cache, and some in any case.
_FEW_STEPS = 3
_MANY_STEPS = 32
_CACHED_BYTES = 4 * 2**20


class BufferRow:
    """L layers whose buffers share a device and a dtype, as one row of C channels in all.

    Holds at most 16 vectors of C values between two steps (8 of buffers, 7 of the window, and the
    layer of each channel), or 4 MiB and 8 vectors if that is more.

    Args:
        layers: The layers; either all have counters or none.
        repeats: Calls per batch of a layer, by name; 1 if not given.
        restore_poisoned: As of :class:`bnguard.observe.batch_statistics.BatchProbe`.
    """

    # Trainer.validate runs in inference mode, whose tensors cannot be written to in training.
    @torch.inference_mode(False)
    def __init__(
        self,
        layers: Sequence[BatchNormLayer],
        *,
        repeats: Mapping[str, int],
        restore_poisoned: bool,
    ) -> None:
        self._layers = layers
        self._restore_poisoned = restore_poisoned
        places = [list(layer.statistics()) for layer in layers]
        self._places = [mean for mean, *_ in places] + [var for _, var, *_ in places]
        self._has_counters = layers[0].counter is not None
        self._counter_places = [place[2] for place in places] if self._has_counters else []
        self._buffers = self._current()
        self._are_plain = all(
            buffer.dim() == 1 and not buffer.requires_grad for buffer in self._buffers
        )
        self._index = {layer.name: index for index, layer in enumerate(layers)}

        first = self._buffers[0]
        self._device = first.device
        # Statistics of half-precision buffers are kept in float32.
        self._dtype = torch.promote_types(first.dtype, torch.float32)
        sizes = [buffer.numel() for buffer in self._buffers[: len(layers)]]
        edges = [0, *itertools.accumulate(sizes)]
        self._slices = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        self._edges = torch.tensor(edges, device=self._device)
        numbers = torch.arange(len(layers), dtype=torch.int32)
        self._layer_of_channel = numbers.repeat_interleave(torch.tensor(sizes)).to(self._device)

        self._momentum_places = [place for layer in layers for place in layer.momentum_place()]
        self._repeats = dict(repeats)
        self._use_momenta(self._current_momenta())

        channels = edges[-1]
        fitting = _CACHED_BYTES // max(2 * channels * self._dtype.itemsize, 1) - 1
        self._most_steps = 1 if restore_poisoned else min(max(fitting, _FEW_STEPS), _MANY_STEPS)
        # The buffers before the first of the steps that wait, and after each: means, variances.
        self._values = torch.zeros(
            self._most_steps + 1, 2 * channels, dtype=self._dtype, device=self._device
        )
        self._counters = torch.zeros(
            self._most_steps + 1, len(layers), dtype=torch.long, device=self._device
        )
        self._rows = [*zip(self._values, self._counters, strict=True)]
        self._steps: list[int] = []
        self._copy_to(0)
        self._updates = torch.zeros(
            len(layers), dtype=wide_dtype(self._device), device=self._device
        )
        self._restored = torch.zeros_like(self._updates)
        self._poisoned_step = torch.full_like(self._updates, math.nan)
        self.start_window()

    def is_stale(self) -> bool:
        """Return whether the layers have other buffers now.

        A class without a counter may replace its tensors at each update: there, only a change of
        shape, dtype or device counts.
        """
        current = self._current()
        if self._has_counters:
            return not all(map(operator.is_, current, self._buffers))
        return list(map(_kind, current)) != list(map(_kind, self._buffers))

    @torch.inference_mode(False)
    def start_window(self) -> None:
        """Begin a new window of batch statistics."""
        self._condense()
        self._window = Window(self._values[0].view(2, -1)[0])
        self._weight_squares = torch.zeros_like(self._updates)
        self._blends = torch.zeros_like(self._updates)

    def take_as_old(self) -> None:
        """Do not count changes of the buffers so far as updates."""
        self._condense()
        self._copy_to(0)

    def skip_to(self, step: int) -> None:
        """Go on from the buffers after a step, the first after several that were not read.

        Their updates are counted, but what the batches were is not known.
        """
        self._condense()
        self._steps.append(step)
        self._copy_to(1)
        values = self._values[:2].view(2, 2, -1)
        self._updates += self._rises(self._counters[:2], values[:1], values[1:]).sum(0)
        if not self._knows_at_once(values[1].sum().isfinite()):
            self._note_poison(values[1:])
        self._go_on_from(1)
        self._window.skip()

    def use_repeats(self, repeats: Mapping[str, int]) -> None:
        """Set the calls per batch of layers, for pending steps too."""
        self._repeats = dict(repeats)
        self._use_momenta(self._momenta)

    def read(self, step: int, at_calls: Mapping[str, tuple[Tensor, int]]) -> None:
        """Read the buffers after a step.

        Args:
            step: Number of the step.
            at_calls: Statistics, ``(2, C)``, and number of the batches that the layers with these
                names were called with, where the buffers are too coarse to show them.
        """
        momenta = self._current_momenta()
        if momenta != self._momenta:
            self._condense()
            self._use_momenta(momenta)
        self._steps.append(step)
        self._copy_to(len(self._steps))
        if len(self._steps) == self._most_steps or at_calls:
            self._condense(at_calls)

    def readings(self) -> dict[str, BufferReading]:
        """Return the readings by layer name, in one transfer from the device."""
        self._condense()
        channels = wide(torch.cat([self._values[0].view(2, -1), self._window.rows()]))
        layers = torch.stack(
            [
                wide(self._counters[0]),
                self._updates,
                self._poisoned_step,
                self._restored,
                self._weight_squares / self._blends,
            ]
        )
        flat = torch.cat([channels.view(-1), layers.view(-1)]).cpu().double().numpy()
        by_channel = flat[: channels.numel()].reshape(channels.shape)
        by_layer = flat[channels.numel() :].reshape(layers.shape)
        return {
            name: self._reading(by_channel[:, self._slices[index]], by_layer[:, index])
            for name, index in self._index.items()
        }

    def _reading(self, by_channel: FloatArray, by_layer: FloatArray) -> BufferReading:
        mean, var = by_channel[:2]
        counter, updates, poisoned_step, restored, weight_square = map(float, by_layer)
        return BufferReading(
            running=RunningStatistics(
                mean=mean, var=var, updates=int(counter) if self._has_counters else None
            ),
            updates=int(updates),
            window=self._window.reading(
                by_channel[2:], 1.0 if math.isnan(weight_square) else weight_square
            ),
            poisoned_step=None if math.isnan(poisoned_step) else int(poisoned_step),
            restored_updates=int(restored),
        )

    def _current(self) -> list[Tensor]:
        return [holder.get(name) for holder, name in self._places]  # type: ignore[misc]

    def _copy_to(self, row: int) -> None:
        """Copy the buffers as they are now."""
        if not self._has_counters:
            self._buffers = self._current()
        flat, (values, counters) = self._buffers, self._rows[row]
        if not self._are_plain:
            flat = [buffer.detach().reshape(-1) for buffer in flat]
        torch.cat(flat, out=values)
        if self._has_counters:
            torch.stack([holder[name] for holder, name in self._counter_places], out=counters)

    def _current_momenta(self) -> list[object]:
        return [getattr(module, name) for module, name in self._momentum_places]

    @torch.inference_mode(False)
    def _use_momenta(self, momenta: list[object]) -> None:
        self._momenta = momenta
        values = [layer.momentum for layer in self._layers]
        self._is_plain = torch.tensor([value is None for value in values], device=self._device)
        self._kept_of_old = torch.tensor(
            [1.0 - (value or 0.0) for value in values],
            dtype=wide_dtype(self._device),
            device=self._device,
        )
        repeats = [self._repeats.get(layer.name, 1) for layer in self._layers]
        self._repeated = torch.tensor(repeats, dtype=wide_dtype(self._device), device=self._device)
        kept = self._kept_of_old**self._repeated
        self._blend_factor = (1.0 - kept) / (1.0 + kept)
        # Of steps with one update of each layer, as most are; none for an average of all batches.
        self._single: tuple[Tensor, Tensor] | None = None
        if None not in values:
            once = torch.ones_like(self._repeated).unsqueeze(0)
            weights, weight_squares = self._weights(once, once)
            factor = (1.0 / weights)[0, 0].to(self._dtype)
            if len(set(values)) > 1:
                factor = self._of_channels(1.0 / weights)
            self._single = factor, weight_squares

    @torch.inference_mode(False)
    @torch.no_grad()
    def _condense(self, at_calls: Mapping[str, tuple[Tensor, int]] | None = None) -> None:
        """Turn the steps that wait into batches, and add these to the window."""
        if not self._steps:
            return
        waiting = len(self._steps)
        values = self._values[: waiting + 1].view(waiting + 1, 2, -1)
        counters = self._counters[: waiting + 1]
        old, new = values[:-1], values[1:]
        rises = self._rises(counters, old, new)
        if self._single is not None and self._knows_at_once((rises == 1).all()):
            factor, weight_squares = self._single
            weight_squares = weight_squares.repeat(waiting, 1)
        else:
            weights, weight_squares = self._weights(rises, counters[1:])
            factor = self._of_channels(1.0 / weights)
        batches = torch.lerp(old, new, factor)
        for name, (statistics, count) in (at_calls or {}).items():
            index = self._index.get(name)
            if index is not None:
                batches[-1, :, self._slices[index]] = statistics.to(batches)
                weight_squares[-1, index] = 1.0 / count
        # Batches are finite only if the buffers are.
        is_finite = self._knows_at_once(batches.sum().isfinite())
        if not is_finite:
            self._note_poison(new)
        self._window.add(batches, is_finite=is_finite)
        self._updates += rises.sum(0)
        self._weight_squares += torch.where(rises > 0, weight_squares, 0.0).sum(0)
        self._blends += (rises > 0).sum(0)
        if self._restore_poisoned:
            self._restore(old[-1], new[-1])
        self._go_on_from(waiting)

    def _go_on_from(self, row: int) -> None:
        """Take the buffers after the newest step as those before the next."""
        self._values[0] = self._values[row]
        self._counters[0] = self._counters[row]
        self._steps.clear()

    def _of_channels(self, of_layers: Tensor) -> Tensor:
        """Return values ``(K, L)`` for each channel, ``(K, 1, C)``."""
        return of_layers.to(self._dtype).index_select(1, self._layer_of_channel).unsqueeze(1)

    def _rises(self, counters: Tensor, old: Tensor, new: Tensor) -> Tensor:
        """Return the updates of each layer per step; without a counter, whether it changed."""
        if self._has_counters:
            return (counters[1:] - counters[:-1]).clamp_min(0)
        return self._in_layers((old != new).any(1)).long()

    def _weights(self, rises: Tensor, counters: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight of a step's k batches in the running statistics, shape ``(K, L)``.

        And the sum of the squares of their weights relative to each other, 1 for one batch: these
        are momentum * (1 - momentum)^i in an exponential average, equal in a plain one.
        """
        kept = self._kept_of_old**rises
        weights = torch.where(self._is_plain, rises / counters.clamp_min(1), 1.0 - kept)
        exponential = self._blend_factor * (1.0 + kept) / (1.0 - kept)
        return weights, torch.where(self._is_plain, self._repeated / rises, exponential)

    def _note_poison(self, new: Tensor) -> None:
        """Note the first step after which the statistics of a layer are not finite."""
        bad = self._in_layers(~new.isfinite().all(1))
        for step, is_bad in zip(self._steps, bad, strict=True):
            is_first = is_bad & self._poisoned_step.isnan()
            self._poisoned_step.masked_fill_(is_first, step)

    def _restore(self, old: Tensor, new: Tensor) -> None:
        """Put old statistics back in the channels whose new ones are not finite."""
        bad = ~new.isfinite().all(0) & old.isfinite().all(0)
        if self._knows_at_once(~bad.any()):
            return
        self._restored += self._in_layers(bad)
        new.copy_(torch.where(bad, old, new))
        sizes = [buffer.numel() for buffer in self._buffers]
        for buffer, values in zip(self._buffers, torch.split(new.view(-1), sizes), strict=True):
            # .data keeps the version counter, which a backward may check.
            buffer.data.copy_(values.view_as(buffer))

    def _knows_at_once(self, fact: Tensor) -> bool:
        """Return whether a fact is known to hold, without waiting for a device."""
        return self._device.type == "cpu" and bool(fact)

    def _in_layers(self, flags: Tensor) -> Tensor:
        """Return the layers with a flag in any channel: ``(..., C)`` to ``(..., L)``."""
        sums = F.pad(flags.cumsum(-1), (1, 0)).index_select(-1, self._edges)
        return sums.diff(dim=-1) > 0


@dataclass(frozen=True, kw_only=True, eq=False)
class BufferReading:
    """The reading of one layer.

    Attributes:
        running: The running statistics.
        updates: Updates since watching began.
        window: Batch statistics of the current window; None without a batch.
        poisoned_step: First step after which a running statistic was not finite.
        restored_updates: Steps in which statistics were restored.
    """

    running: RunningStatistics
    updates: int
    window: BatchWindow | None
    poisoned_step: int | None
    restored_updates: int

    def after(self, earlier: BufferReading | None) -> BufferReading:
        """Return this reading as continuation of one from before the buffers were replaced."""
        if earlier is None or earlier.running.mean.shape != self.running.mean.shape:
            return self
        is_poisoned = earlier.poisoned_step is not None
        return dataclasses.replace(
            self,
            updates=earlier.updates + self.updates,
            window=self.window or earlier.window,
            poisoned_step=earlier.poisoned_step if is_poisoned else self.poisoned_step,
            restored_updates=earlier.restored_updates + self.restored_updates,
        )


def _kind(buffer: Tensor | None) -> tuple[object, ...] | None:
    return None if buffer is None else (buffer.shape, buffer.dtype, buffer.device)
