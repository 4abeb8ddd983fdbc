"""What viewers without the tab are given: a few scalars a metric, and the findings as Markdown."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bnguard.tensorboard.metadata import Metric
from bnguard.tensorboard.records import Record, finding_record

_QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}


def lean_scalars(metrics: Sequence[Metric], values: npt.ArrayLike) -> dict[str, float]:
    """Return quantiles over the layers, and the worst layer, of each metric that has them.

    At most four a metric, however many layers: 5 %, 50 %, 95 %, and ``max``, or ``min`` where the
    fault lies below the limit. Values that are not finite are left out.

    Args:
        metrics: What the rows are.
        values: Shape ``(metrics, layers)``.

    Example:
        >>> shift = Metric(key="shift", name="Shift", unit="σ", description="", panel="")
        >>> lean_scalars([shift], [[1.0, 3.0]])["bnguard/shift/max"]
        3.0
    """
    scalars: dict[str, float] = {}
    for metric, row in zip(metrics, np.asarray(values, dtype=np.float64), strict=True):
        known = row[np.isfinite(row)]
        if not metric.has_quantiles or known.size == 0:
            continue
        if metric.limit_side == "either":
            known = np.abs(known)
        for name, quantile in _QUANTILES.items():
            scalars[f"bnguard/{metric.key}/{name}"] = float(np.quantile(known, quantile))
        if metric.limit_side == "below":
            scalars[f"bnguard/{metric.key}/min"] = float(known.min())
        else:
            scalars[f"bnguard/{metric.key}/max"] = float(known.max())
    return scalars


def findings_markdown(findings: Iterable[Mapping[str, Any]]) -> str:
    """Return findings as a Markdown table, in which nothing but the table is markup.

    Findings of one rule and severity share a row, so that one cause does not fill the page.

    >>> print(findings_markdown([]))
    Nothing is wrong.
    """
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in map(finding_record, findings):
        groups.setdefault((record["code"], record["severity"]), []).append(record)
    if not groups:
        return "Nothing is wrong."
    head = "| finding | severity | layer | since step | evidence | next step |"
    rows = ["| " + " | ".join(map(_cell, _cells(group))) + " |" for group in groups.values()]
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _cells(group: Sequence[Record]) -> tuple[str, ...]:
    record = group[0]
    evidence, fix = record["evidence"], record["fix"]
    where = "the model" if record["layer"] is None else record["layer"]
    return (
        f"{record['code']} {record['name']}",
        record["severity"],
        where if len(group) == 1 else f"{len(group)} layers, worst {where}",
        str(min((r["step"] for r in group if r["step"] is not None), default="")),
        f"{record['message']}: {evidence['name']} {_amount(evidence['value'], evidence['unit'])} "
        f"(limit {_amount(evidence['limit'], evidence['unit'])})",
        fix["command"] or fix["summary"],
    )


def _amount(value: float | str | None, unit: str) -> str:
    number = f"{value:.4g}" if isinstance(value, float) else "–" if value is None else value
    return f"{number} {unit}".rstrip()


def _cell(text: str) -> str:
    """Escape what Markdown or HTML would read as markup: names come from anywhere."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{char}" if char in r"\`*_[]|#" else char for char in escaped)
