"""What arrives at each layer in eval mode, in the first batches of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnguard.layers import BatchNormLayer
from bnguard.moments import Moments, channel_moments, merge_moments
from bnguard.probes.hooks import Hooks, Note


@dataclass(frozen=True, eq=False)
class EvalReading:
    """What arrived at one layer.

    Attributes:
        moments: Moments over all calls read that were finite.
        calls: Calls read.
        nonfinite_calls: Calls read that held NaN or Inf, and are left out of ``moments``.
        largest_normalised: Largest |value - running mean| / sqrt(running var + eps), in running
            standard deviations; NaN where no value was finite.
        padding_share: Share of the positions of a sample that are trailing constant padding. The
            mean over samples.
        padding_spread: Standard deviation of that share over the samples.
        dtype: Element type of the values.
    """

    moments: Moments
    calls: int
    nonfinite_calls: int
    largest_normalised: float
    padding_share: float
    padding_spread: float
    dtype: str


class EvalProbe:
    """Takes the moments of what arrives at each layer in eval mode, for its first calls.

    Args:
        layers: The layers to watch.
        max_calls: Calls a layer that are read; the rest of the evaluation costs nothing.
    """

    def __init__(self, layers: Iterable[BatchNormLayer], max_calls: int) -> None:
        self.hooks = Hooks()
        self._records: dict[str, _Record] = {}
        for layer in layers:
            record = self._records[layer.name] = _Record()
            self.hooks.before(layer.module, _noted(layer, record, max_calls))

    def readings(self) -> dict[str, EvalReading]:
        """Return what was read, by layer name; layers that were not called are left out."""
        return {name: record.reading() for name, record in self._records.items() if record.parts}


@dataclass
class _Record:
    """Per call: moments, the largest normalised value, and the padding share of each sample."""

    parts: list[tuple[Moments, Tensor, Tensor]] = field(default_factory=list)
    dtype: str = ""

    def reading(self) -> EvalReading:
        finite = [moments for moments, _, _ in self.parts if _is_finite(moments)]
        # With nothing finite, what is left of the moments is their being NaN.
        kept = finite or [self.parts[0][0]]
        extremes = torch.stack([extreme for _, extreme, _ in self.parts])
        padding = torch.cat([shares for _, _, shares in self.parts])
        return EvalReading(
            moments=merge_moments(kept),
            calls=len(self.parts),
            nonfinite_calls=len(self.parts) - len(finite),
            largest_normalised=float(extremes[extremes.isfinite()].max())
            if extremes.isfinite().any()
            else float("nan"),
            padding_share=float(padding.mean()),
            padding_spread=float(padding.std(correction=0)),
            dtype=self.dtype,
        )


def _is_finite(moments: Moments) -> bool:
    return bool(moments.mean.isfinite().all() & moments.squares.isfinite().all())


def _noted(layer: BatchNormLayer, record: _Record, max_calls: int) -> Note:
    parts = record.parts

    @torch.no_grad()
    def note(args: tuple[object, ...]) -> None:
        if len(parts) >= max_calls or layer.uses_batch_statistics:
            return
        values = args[0] if args else None
        if isinstance(values, Tensor) and values.numel() and layer.normalises(values):
            record.dtype = str(values.dtype).removeprefix("torch.")
            moments = channel_moments(values)
            parts.append((moments, _extreme(values, layer), _padding_shares(values)))

    return note


def _extreme(values: Tensor, layer: BatchNormLayer) -> Tensor:
    """Return the largest normalised value of a call, a scalar."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    dims = [0, *range(2, values.dim())]
    low, high = values.amin(dims).double(), values.amax(dims).double()
    distance = torch.maximum(high - mean, mean - low)
    return (distance / torch.sqrt(var.double() + layer.eps)).amax()


def _padding_shares(values: Tensor) -> Tensor:
    """Return the share of each sample's positions that are trailing padding, shape ``(N,)``.

    Along each axis the constant margin at the end counts by what it has more than that at the
    beginning: a dark background has both, and repeated values inside have neither. A margin of
    one is the last position itself.
    """
    if values.dim() < 3:
        return torch.zeros(len(values), dtype=torch.float64, device=values.device)
    corner = values.flatten(2)[:, :, -1:]
    # Where the last two positions differ in every sample nothing is padded: no need to look on.
    is_padded = (values.flatten(2)[:, :, -2:-1] == corner).all(1)
    if not is_padded.any():
        return torch.zeros(len(values), dtype=torch.float64, device=values.device)
    equal = (values.flatten(2) == corner).all(1).unflatten(1, values.shape[2:])
    kept = torch.ones(len(values), dtype=torch.float64, device=values.device)
    for axis in range(1, equal.dim()):
        others = [other for other in range(1, equal.dim()) if other != axis]
        constant = (equal.all(others) if others else equal).long()
        head, tail = constant.cumprod(1).sum(1), constant.flip(1).cumprod(1).sum(1)
        padded = torch.where(tail > 1, tail - head, 0).clamp(min=0)
        kept *= 1.0 - padded / equal.shape[axis]
    return 1.0 - kept
