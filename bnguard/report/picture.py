"""Draws a report as one picture: what the first finding measured, layers by steps."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bnguard.errors import ConfigurationError
from bnguard.findings import Evidence, Finding, Severity
from bnguard.observe.history import History
from bnguard.rules.measurements import DRIFT_LIMITS, distance_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bnguard.report import Report

# More columns than this add nothing to a picture.
_MOST_MOMENTS = 100
# As many layers as can be labelled one by one.
_MOST_LABELS = 40
_TITLE_WIDTH = 110
_LABEL_WIDTH = 24
# Blue up to the limit and orange beyond it, which colour-blind people can tell apart; worse is
# darker. The limit is the middle, so that it is seen wherever the values are.
_COLOURS = [(0.0, "#f2f7fb"), (0.5, "#9ecae1"), (0.5, "#fdae6b"), (1.0, "#7f2704")]


@dataclass(frozen=True)
class Moment:
    """What was measured at a step.

    Attributes:
        step: The training step.
        measured: Values by measure, then by layer; None is the model.
    """

    step: int
    measured: Mapping[str, Mapping[str | None, float]]


class Course:
    """Keeps up to a hundred moments of a training, evenly spread over it."""

    def __init__(self) -> None:
        self.moments: tuple[Moment, ...] = ()
        self._checks = 0
        self._stride = 1

    def note(self, history: History, findings: Iterable[Finding], step: int) -> None:
        """Measure a moment, unless there are enough around it."""
        self._checks += 1
        if self._checks % self._stride == 0:
            self.moments = self.until(measure(history, findings, step))
        if len(self.moments) > _MOST_MOMENTS:
            self.moments = self.moments[1::2]
            self._stride *= 2

    def until(self, last: Moment) -> tuple[Moment, ...]:
        """Return the moments before another one, and that one."""
        return (*(moment for moment in self.moments if moment.step < last.step), last)


def measure(history: History, findings: Iterable[Finding], step: int) -> Moment:
    """Measure each layer, and add what only the findings know."""
    measured: dict[str, dict[str | None, float]] = {}
    for layer in history.layers:
        distance = distance_of(layer)
        values = {drift.measure: drift.value for drift in (distance and distance.measured) or ()}
        if layer.typical_values_per_channel is not None:
            values["values per channel"] = layer.typical_values_per_channel
        if layer.initial_weight is not None:
            values["initial statistics left"] = 100.0 * layer.initial_weight
        for name, value in values.items():
            measured.setdefault(name, {})[layer.name] = value
    for finding in findings:
        of_layers = measured.setdefault(finding.evidence.measure, {})
        of_layers.setdefault(finding.layer, finding.evidence.value)
    return Moment(step, measured)


def draw(report: Report) -> Figure:
    """Return the picture of a report; see :meth:`bnguard.report.Report.plot`."""
    try:
        from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigurationError(
            'a picture needs matplotlib, which is not installed: pip install "bnguard[plot]"'
        ) from error
    evidence = _evidence(report)
    moments = report.course or (measure(report.history, report.findings, 0),)
    columns = [moment.measured.get(evidence.measure, {}) for moment in moments]
    rows: list[str | None] = [layer.name for layer in report.history.layers_in_order]
    rows += [None] if any(None in column for column in columns) or not rows else []
    values = np.array([[column.get(row, np.nan) for column in columns] for row in rows])

    finite, limit = values[np.isfinite(values)], evidence.limit
    bottom = float(np.min(finite, initial=min(0.0, limit)))
    top = float(np.max(finite, initial=2.0 * abs(limit) or 1.0))
    colours = LinearSegmentedColormap.from_list("bnguard", _COLOURS)

    figure = Figure(figsize=(9.0, min(12.0, 2.5 + 0.25 * len(rows))), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")
    image = axes.pcolormesh(
        _edges([moment.step for moment in moments]),
        np.arange(len(rows) + 1),
        np.ma.masked_invalid(np.clip(values, bottom, top)),
        norm=TwoSlopeNorm(limit, min(bottom, limit - 1.0), top),
        cmap=colours.reversed() if evidence.is_minimum else colours,
    )
    labelled = range(0, len(rows), 1 + len(rows) // _MOST_LABELS)
    axes.set_yticks([row + 0.5 for row in labelled], [rows[row] or "model" for row in labelled])
    axes.invert_yaxis()
    if not report.course:
        axes.set_xticks([])
    has_gaps = bool(np.isnan(values).any())
    time = "training step" if report.course else "now"
    axes.set_xlabel(f"{time} (grey: nothing measured)" if has_gaps else time)
    figure.suptitle(_verdict(report), x=0.01, ha="left", fontsize="medium")
    label = textwrap.fill(evidence.measure, _LABEL_WIDTH)
    bar = figure.colorbar(image, fraction=0.03, label=label)
    ticks = {place: evidence.amount(place) for place in (top, bottom)}
    ticks[limit] = f"limit {evidence.amount(limit)}"
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.set_ylim(bottom, top)
    return figure


def _evidence(report: Report) -> Evidence:
    """Return what the first finding measured; the largest drift of a healthy run."""
    for group in report.groups:
        if group.worst.severity > Severity.INFO:
            return group.worst.evidence
    distances = [distance_of(layer) for layer in report.layers]
    drifts = [distance.worst for distance in distances if distance and distance.worst]
    nothing = Evidence("shift of the mean", 0.0, DRIFT_LIMITS.max_shift, "σ")
    return max(drifts, key=lambda drift: drift.excess, default=nothing)


def _verdict(report: Report) -> str:
    from bnguard.report.terminal import heading, root_view

    accused = (group for group in report.groups if group.worst.severity > Severity.INFO)
    verdict = next(map(root_view, accused), heading(report))
    return "\n".join(textwrap.fill(line, _TITLE_WIDTH) for line in verdict.plain.splitlines())


def _edges(steps: Sequence[int]) -> list[float]:
    """Return where columns begin and end: each shows what was measured up to its step."""
    first = 2 * steps[0] - steps[1] if len(steps) > 1 else steps[0] - 1
    return [max(0, first) if steps[0] else -1, *steps]
