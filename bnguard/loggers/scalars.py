"""The numbers that every logger gets: five by default, under a name that sorts behind the user's.

================================= ===============================================================
``zz_bnguard/shift``              shift of the mean in eval mode, at the worst layer (BN301)
``zz_bnguard/variance``           log-variance ratio in eval mode, at the worst layer (BN301)
``zz_bnguard/mode_gap``           change of the outputs between the modes, beyond sampling (BN302)
``zz_bnguard/values_per_channel`` values per channel, at the layer that has the fewest (BN201)
``zz_bnguard/findings``           number of findings of severity ``warning`` or ``error``
================================= ===============================================================

The first four are relative to the limit of their rule: above 1 is beyond it. What was not measured,
as before the first validation, or has no limit, since its rule does not run, is not logged.

With ``scalars="all"`` the metrics of the TensorBoard tab are logged as well, as quantiles over the
layers: ``zz_bnguard/METRIC/p05``, ``p50``, ``p95``, and ``max`` (``min`` for ``variance_kept`` and
``values_per_channel``). METRIC is ``eval_shift_std``, ``eval_log_variance_ratio``,
``batch_shift_std``, ``batch_log_variance_ratio``, ``variance_kept``, ``values_per_channel``,
``gain`` or ``dead_channel_share``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from bnguard.findings import Severity
from bnguard.observe.history import LayerHistory, Run
from bnguard.report import Report
from bnguard.rules import Rule
from bnguard.rules.bn302_mode_gap import ModesDisagree
from bnguard.rules.measurements import excess_change, is_known
from bnguard.tensorboard.measures import compute_metrics
from bnguard.tensorboard.metadata import Metric, standard_metrics

Scalars = Literal["summary", "all", "none"]

# A digit or a punctuation mark would sort before the user's names, or is not allowed by MLflow.
PREFIX = "zz_bnguard"

_METRICS = {
    "shift": "eval_shift_std",
    "variance": "eval_log_variance_ratio",
    "values_per_channel": "values_per_channel",
}
_QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


def scalars_of(report: Report, rules: Iterable[Rule], scalars: Scalars) -> dict[str, float]:
    """Return the scalars of a report, by name; none of a report without layers."""
    if scalars == "none" or not report.layers:
        return {}
    rules = tuple(rules)
    metrics = {metric.key: metric for metric in standard_metrics(rules)}
    values = {name: _worst(report.layers, metrics[key]) for name, key in _METRICS.items()}
    values["mode_gap"] = _mode_gap(report.history.run, rules)
    values["findings"] = float(sum(f.severity > Severity.INFO for f in report.findings))
    summary = {f"{PREFIX}/{name}": value for name, value in values.items() if value is not None}
    if scalars == "summary":
        return summary
    every = tuple(metrics.values())
    return {**summary, **layer_quantiles(every, compute_metrics(report.layers, every))}


def layer_quantiles(metrics: Sequence[Metric], values: npt.ArrayLike) -> dict[str, float]:
    """Return quantiles over the layers, and the worst layer, of each metric that has them.

    Values that are not finite are left out.

    Args:
        metrics: What the rows are.
        values: Shape ``(metrics, layers)``.

    Example:
        >>> shift = Metric(key="shift", name="Shift", description="")
        >>> layer_quantiles([shift], [[1.0, 3.0]])["zz_bnguard/shift/max"]
        3.0
    """
    scalars: dict[str, float] = {}
    for metric, row in zip(metrics, np.asarray(values, dtype=np.float64), strict=True):
        known = row[np.isfinite(row)]
        if not metric.has_quantiles or known.size == 0:
            continue
        if metric.limit_side == "either":
            known = np.abs(known)
        name = f"{PREFIX}/{metric.key}"
        for label, quantile in _QUANTILES.items():
            scalars[f"{name}/{label}"] = float(np.quantile(known, quantile))
        is_minimum = metric.limit_side == "below"
        scalars[f"{name}/{'min' if is_minimum else 'max'}"] = float(
            known.min() if is_minimum else known.max()
        )
    return scalars


def _worst(layers: Sequence[LayerHistory], metric: Metric) -> float | None:
    """Return how far the worst layer is towards the limit (below 1), or beyond it (above 1)."""
    if metric.limit is None:
        return None
    values = np.abs(compute_metrics(layers, [metric]).astype(np.float64))
    with np.errstate(all="ignore"):
        shares = metric.limit / values if metric.limit_side == "below" else values / metric.limit
    known = shares[np.isfinite(shares)]
    return float(known.max()) if known.size else None


def _mode_gap(run: Run, rules: Iterable[Rule]) -> float | None:
    rule = next((rule for rule in rules if isinstance(rule, ModesDisagree)), None)
    gap = run.mode_gap
    if rule is None or gap is None or not is_known(gap):
        return None
    has_flips = gap.flipped_share is not None and gap.flipped_share > rule.max_flipped_share
    limit = rule.max_excess_change_with_flips if has_flips else rule.max_excess_change
    share = np.divide(excess_change(gap), limit)
    return float(share) if np.isfinite(share) else None
