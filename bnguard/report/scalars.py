"""Reports as a few scalars, name to number, for any logger."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from bnguard.history import History, LayerHistory
from bnguard.stats import largest, log_variance_ratio, shift_std

_QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}


def scalars(history: History) -> dict[str, float]:
    """Return four quantiles over the layers of each metric that was observed.

    A layer's own number is the largest over its channels; layers where a metric was not observed,
    or is not finite, are left out of it.

    >>> from bnguard.history import Run
    >>> scalars(History(layers=(), run=Run()))
    {}
    """
    result = {}
    for metric, number in METRICS.items():
        known = [value for layer in history.layers if (value := number(layer)) is not None]
        if known:
            for name, quantile in _QUANTILES.items():
                result[f"bnguard/{metric}/{name}"] = float(np.quantile(known, quantile))
    return result


def _batch_shift(layer: LayerHistory) -> float | None:
    if layer.window is None or layer.running is None:
        return None
    running = layer.running
    return largest(shift_std(layer.window.mean, running.mean, running.var, layer.eps))


def _batch_log_variance_ratio(layer: LayerHistory) -> float | None:
    if layer.window is None or layer.running is None:
        return None
    return largest(log_variance_ratio(layer.window.var_unbiased, layer.running.var, layer.eps))


def _eval_shift(layer: LayerHistory) -> float | None:
    return largest(layer.eval_shift_std)


def _eval_log_variance_ratio(layer: LayerHistory) -> float | None:
    return largest(layer.eval_log_variance_ratio)


METRICS: Mapping[str, Callable[[LayerHistory], float | None]] = {
    "batch_shift_std": _batch_shift,
    "batch_log_variance_ratio": _batch_log_variance_ratio,
    "eval_shift_std": _eval_shift,
    "eval_log_variance_ratio": _eval_log_variance_ratio,
}
