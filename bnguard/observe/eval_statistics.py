"""Eval statistics: the moments of the inputs of each layer in eval mode, from part of the calls.

Calls form blocks of at least 32 samples, so that a validation with batch size 1 tells as much as
one with 64. After the first blocks, only those that double their number are read: an evaluation may
be sorted, and its first batches unlike the rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments, channel_moments, merge_moments, wide, wide_dtype
from bnguard.observe.history import EvalWindow
from bnguard.observe.hooks import Hooks
from bnguard.observe.layer_description import running_statistics

# 99th percentile of the standard normal distribution.
_ONE_IN_A_HUNDRED = 2.326

# Smallest number of samples in a block.
_SAMPLES_OF_BLOCK = 32


class EvalProbe:
    """Reads the inputs of layers in eval mode.

    Args:
        model: The model, whose dropouts before a layer are noted.
        layers: The layers to watch.
        first_blocks: First blocks of a layer that are read; of the rest ever fewer are.
    """

    def __init__(
        self, model: nn.Module, layers: Iterable[BatchNormLayer], first_blocks: int
    ) -> None:
        self.hooks = Hooks()
        self._layers = tuple(layers)
        self._records: dict[str, _Record] = {}
        self._first_blocks = first_blocks
        # Those called so far, and the classes of those since the newest layer was first called.
        self._called: set[nn.Module] = set()
        self._dropouts: list[str] = []
        for layer in self._layers:
            record = self._records[layer.name] = _Record()
            self.hooks.before(layer.module, partial(self._note, layer, record))
        for module in model.modules():
            if self._layers and drops_values(module):
                self.hooks.before(module, partial(self._note_dropout, module))

    def _note(self, layer: BatchNormLayer, record: _Record, args: tuple[object, ...]) -> None:
        """Note the first of the dropouts that were called before a layer, and read its inputs."""
        if record.dropout is None:
            record.dropout = next(iter(self._dropouts), "")
            self._dropouts.clear()
        values = args[0] if args else None
        if layer.uses_batch_statistics or not isinstance(values, Tensor):
            return
        if values.numel() and layer.normalises(values):
            block = record.next_block(len(values))
            if _is_read(block, self._first_blocks):
                record.read(values, layer, block)

    def _note_dropout(self, module: nn.Module, args: tuple[object, ...]) -> None:
        if module not in self._called:
            self._called.add(module)
            self._dropouts.append(type(module).__name__)

    def windows(self, step: int) -> dict[str, EvalWindow]:
        """Return the readings with the running statistics of the first, by layer name.

        Layers that were not called, or have no running statistics, are left out.

        Args:
            step: Training step after which the evaluation ran.
        """
        windows = ((name, record.window(step)) for name, record in self._records.items())
        return {name: window for name, window in windows if window is not None}


@dataclass(frozen=True, eq=False)
class _Call:
    """One call; ``samples`` has the moments of the means of its samples."""

    block: int
    moments: Moments
    extreme: Tensor
    padding_shares: Tensor
    samples: Moments


@dataclass
class _Record:
    """The calls of one layer that were read."""

    parts: list[_Call] = field(default_factory=list)
    # Averaged weights, say, are evaluated with statistics of their own, and exchanged again.
    statistics: list[Tensor | None] = field(default_factory=list)
    dropout: str | None = None  # not None once the layer was called
    block: int = 1
    samples_in_block: int = 0
    dtype: str = ""

    def next_block(self, samples: int) -> int:
        """Count the samples of a call and return its block."""
        if self.samples_in_block >= _SAMPLES_OF_BLOCK:
            self.block, self.samples_in_block = self.block + 1, 0
        self.samples_in_block += samples
        return self.block

    @torch.no_grad()
    def read(self, values: Tensor, layer: BatchNormLayer, block: int) -> None:
        """Read the inputs of a call, which belongs to this block."""
        self.dtype = str(values.dtype).removeprefix("torch.")
        if not self.parts:
            statistics = (layer.running_mean, layer.running_var, layer.counter)
            self.statistics = [None if part is None else part.clone() for part in statistics]
        self.parts.append(
            _Call(
                block=block,
                moments=channel_moments(values),
                extreme=_extreme(values, layer),
                padding_shares=_padding_shares(values),
                samples=channel_moments(_mean_of_positions(values)),
            )
        )

    def window(self, step: int) -> EvalWindow | None:
        """Return the calls merged; None without statistics or 2 values per channel."""
        running = running_statistics(*self.statistics) if self.parts else None
        if running is None:
            return None
        finite = [call for call in self.parts if call.moments.is_finite]
        # If no call is finite, the moments are NaN.
        moments = merge_moments([call.moments for call in finite or self.parts[:1]])
        if moments.count < 2:
            return None
        extremes = torch.stack([call.extreme for call in self.parts])
        known = extremes[extremes.isfinite()]
        padding = torch.cat([call.padding_shares for call in self.parts])
        var_between, between_share, is_between_shown = _between(finite)
        return EvalWindow(
            count=moments.count,
            batches=len(self.parts),
            nonfinite_batches=len(self.parts) - len(finite),
            mean=moments.mean.cpu().numpy(),
            var_unbiased=moments.var_unbiased.cpu().numpy(),
            largest_normalised_std=float(known.max()) if known.numel() else math.nan,
            padding_share=float(padding.mean()),
            padding_spread=float(padding.std(correction=0)),
            dtype=self.dtype,
            var_between=None if var_between is None else var_between.cpu().numpy(),
            between_share=between_share,
            is_between_shown=is_between_shown,
            dropout_before=self.dropout or "",
            running=running,
            step=step,
        )


def _between(calls: Sequence[_Call]) -> tuple[Tensor | None, float, bool]:
    """Return the variance between blocks, its share of the whole, and whether that is significant.

    Blocks of m independent samples have means of variance 1/m of that between samples. This is the
    analysis of variance with one random factor; the share is the intraclass correlation (Fisher,
    "Statistical Methods for Research Workers", 1925, chapter 7).
    """
    blocks = [
        merge_moments([call.samples for call in block])
        for _, block in itertools.groupby(calls, key=lambda call: call.block)
    ]
    several = [block for block in blocks if block.count > 1]
    if len(several) < 2:
        return None, 0.0, False
    total = sum(block.count for block in several)
    samples = total / len(several)
    within = torch.stack([block.var_unbiased for block in several]).mean(0)
    var = torch.stack([block.mean for block in several]).var(0)
    between = (var - within / samples).clamp_min(0.0)
    varies = between + within > 0.0
    if not varies.any():
        return between, 0.0, False
    is_shown = samples * var > _largest_of_independent(len(several), total) * within
    share = (between / (between + within))[varies].median()
    return between, float(share), bool(is_shown[varies].double().mean() > 0.5)


def _largest_of_independent(blocks: int, samples: int) -> float:
    """Return the 99th percentile of the variance ratio F of independent samples.

    Half its logarithm is nearly normal (Fisher, the same book, chapter 7: the z distribution).
    """
    between, within = blocks - 1, samples - blocks
    mean, var = 1 / within - 1 / between, 2 / within + 2 / between
    return math.exp(mean + _ONE_IN_A_HUNDRED * math.sqrt(var))


def drops_values(module: nn.Module) -> bool:
    """Return whether a module drops values or paths in training, by the name of its class.

    >>> [drops_values(module) for module in (nn.Dropout(0.5), nn.Dropout2d(0.0), nn.ReLU())]
    [True, False, False]
    """
    is_named = any(word in type(module).__name__ for word in ("Drop", "StochasticDepth"))
    is_leaf = next(module.children(), None) is None
    return is_named and is_leaf and getattr(module, "p", 1.0) != 0.0


def _is_read(block: int, first: int) -> bool:
    """Return whether a block is read: the first ones, then each that doubles their number.

    >>> [block for block in range(1, 70) if _is_read(block, 4)]
    [1, 2, 3, 4, 8, 16, 32, 64]
    """
    times, rest = divmod(block, first) if first else (0, 1)
    return block <= first or (rest == 0 and times.bit_count() == 1)


def _mean_of_positions(values: Tensor) -> Tensor:
    """Return the mean of each sample and channel, shape ``(N, C)``."""
    if values.dim() == 2:
        return wide(values)
    # Half-precision sums overflow.
    dtype = torch.promote_types(values.dtype, torch.float32)
    return wide(values.flatten(2).mean(2, dtype=dtype))


def _extreme(values: Tensor, layer: BatchNormLayer) -> Tensor:
    """Return the largest normalised value of a call, a scalar."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    dims = [0, *range(2, values.dim())]
    low, high = wide(values.amin(dims)), wide(values.amax(dims))
    distance = torch.maximum(high - mean, mean - low)
    return (distance / torch.sqrt(wide(var) + layer.eps)).amax()


def _padding_shares(values: Tensor) -> Tensor:
    """Return the share of each sample's positions that are trailing padding, shape ``(N,)``.

    Along each axis, that is the constant margin at the end beyond the one at the beginning: a dark
    background has both. A margin of one is the last position itself.
    """
    kept = torch.ones(len(values), dtype=wide_dtype(values.device), device=values.device)
    if values.dim() < 3:
        return 1.0 - kept
    flat = values.flatten(2)
    corner = flat[:, :, -1:]
    # Nothing is padded if the last two positions differ in every sample.
    if not (flat[:, :, -2:-1] == corner).all(1).any():
        return 1.0 - kept
    equal = (flat == corner).all(1).reshape(len(values), *values.shape[2:])
    for axis in range(1, equal.dim()):
        others = [other for other in range(1, equal.dim()) if other != axis]
        constant = (equal.all(others) if others else equal).long()
        head, tail = constant.cumprod(1).sum(1), constant.flip(1).cumprod(1).sum(1)
        padded = torch.where(tail > 1, tail - head, 0).clamp(min=0)
        kept *= 1.0 - padded / equal.shape[axis]
    return 1.0 - kept
