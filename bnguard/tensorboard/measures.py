"""Computes the metrics of the tab from the history of a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from bnguard.layers.distances import FloatArray, log_variance_ratio, shift_std
from bnguard.observe.history import LayerHistory
from bnguard.rules.bn101_frozen_but_updating import FrozenButUpdating
from bnguard.rules.bn203_correlated_batches import CorrelatedBatches
from bnguard.rules.bn204_dead_channels import DeadChannels
from bnguard.tensorboard.metadata import Metric

# Share of the channels that a layer's number speaks for, as in the rules on drift.
_CHANNEL_QUANTILE = 0.9

# Which channels of a layer never vary, as BN204 sees it.
dead_channels = DeadChannels().dead
_frozen = FrozenButUpdating()
_correlated = CorrelatedBatches()


def compute_metrics(
    layers: Sequence[LayerHistory], metrics: Sequence[Metric]
) -> npt.NDArray[np.float32]:
    """Return the metrics of layers, shape ``(metrics, layers)``; NaN if not observed."""
    with np.errstate(all="ignore"):
        rows = [[MEASURES[metric.key](layer) for layer in layers] for metric in metrics]
    return np.array(rows, dtype=np.float32).reshape(len(metrics), len(layers))


def _batch_shift_std(layer: LayerHistory) -> float:
    if layer.window is None or layer.running is None:
        return math.nan
    running = layer.running
    return abs(_typical(shift_std(layer.window.mean, running.mean, running.var, layer.eps)))


def _batch_log_variance_ratio(layer: LayerHistory) -> float:
    if layer.window is None or layer.running is None:
        return math.nan
    return _typical(log_variance_ratio(layer.window.var_unbiased, layer.running.var, layer.eps))


def _variance_kept(layer: LayerHistory) -> float:
    n = layer.typical_values_per_channel
    if layer.window is None or n is None:
        return math.nan
    within = layer.window.var_unbiased * ((n - 1) / n)
    share = within / (within + layer.window.var_of_means_successive)
    return float(np.nanmedian(share)) if np.isfinite(share).any() else math.nan


def _gain(layer: LayerHistory) -> float:
    if layer.running is None or layer.running.var.size == 0:
        return math.nan
    gamma = np.ones_like(layer.running.var) if layer.gamma is None else layer.gamma
    return float(np.max(np.abs(gamma) / np.sqrt(layer.running.var + layer.eps)))


def _dead_channel_share(layer: LayerHistory) -> float:
    is_dead = dead_channels(layer)
    return math.nan if is_dead is None else float(is_dead.mean())


def _frozen_moved_std(layer: LayerHistory) -> float:
    start, now = layer.running_at_start, layer.running
    if not (layer.is_affine_frozen and layer.updates_seen) or start is None or now is None:
        return math.nan
    if _frozen.is_harmless(layer) or start.mean.shape != now.mean.shape:
        return math.nan
    return float(np.max(np.abs(shift_std(now.mean, start.mean, start.var, layer.eps)), initial=0.0))


def _data_order(layer: LayerHistory) -> float:
    inputs = layer.run.inputs
    if layer.position != 0 or inputs is None or inputs.batches < _correlated.min_batches:
        return math.nan
    ratio = inputs.variance_ratio[np.isfinite(inputs.variance_ratio)]
    if not ratio.size:
        return math.nan
    between = float(np.median(inputs.between_windows)) if inputs.between_windows.size else 0.0
    return max(
        float(np.median(ratio)) / _correlated.limit_of(inputs.batches),
        between / _correlated.max_between_windows,
    )


def _typical(values: FloatArray | None) -> float:
    """Return the absolute value that nine of ten channels stay below, signed as the furthest.

    Infinite if no channel is finite; NaN if nothing was observed.
    """
    if values is None or values.size == 0:
        return math.nan
    size = float(np.quantile(np.abs(values), _CHANNEL_QUANTILE))
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return math.inf
    return math.copysign(size, finite[np.argmax(np.abs(finite))])


def _average(values: FloatArray | None) -> float:
    if values is None or not values.size:
        return math.nan
    return float(np.mean(values)) if np.isfinite(values).all() else math.inf


MEASURES: Mapping[str, Callable[[LayerHistory], float]] = {
    "eval_shift_std": lambda layer: abs(_typical(layer.eval_shift_std)),
    "eval_log_variance_ratio": lambda layer: _typical(layer.eval_log_variance_ratio),
    "batch_shift_std": _batch_shift_std,
    "batch_log_variance_ratio": _batch_log_variance_ratio,
    "variance_kept": _variance_kept,
    "values_per_channel": lambda layer: float(layer.typical_values_per_channel or math.nan),
    "gain": _gain,
    "dead_channel_share": _dead_channel_share,
    "batch_mean": lambda layer: _average(None if layer.window is None else layer.window.mean),
    "running_mean": lambda layer: _average(None if layer.running is None else layer.running.mean),
    "batch_std": lambda layer: _average(
        None if layer.window is None else np.sqrt(layer.window.var_unbiased)
    ),
    "running_std": lambda layer: _average(
        None if layer.running is None else np.sqrt(layer.running.var)
    ),
    "frozen_moved_std": _frozen_moved_std,
    "data_order": _data_order,
}
