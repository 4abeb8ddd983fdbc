"""The result of a diagnosis: a row for each way to normalise, the verdict, the layers to blame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bnguard.findings import counted
from bnguard.recalibration.options import SkippedLayer
from bnguard.report.terminal import layer_table, moved_text
from bnguard.report.views import ResultView, importing_rich

with importing_rich():
    from rich.console import Group, RenderableType
    from rich.padding import Padding
    from rich.text import Text


@dataclass(frozen=True, kw_only=True)
class Row:
    """How the model does with one way to normalise.

    Attributes:
        name: ``"stored"``, ``"reference"``, ``"averaged"``, ``"evaluation"``, ``"batches"``,
            ``"batches of 8"`` or ``"shuffled batches"``.
        label: The same in words.
        score: Result of ``score``; None without one, or if its batches are too small.
        change: How far the outputs are from those with the statistics of the evaluation data:
            root mean square, in standard deviations of these.
        flipped_share: Share of the predictions that differ from those; None if the outputs are not
            class scores.
        gap: The change from the outputs with the statistics of each batch, as ``change``; None if
            batches have none.
        drift_std: How far the evaluation data are from the statistics, in their standard
            deviations: the shift of the mean that 90 % of the channels stay below, at the worst
            layer; None without running statistics.
        drift_log_variance: The same of the logarithm of the variance ratio, without its sign.
        drift_layer: That layer.
        input_drift: The larger of the two at the first BN layer, whose input no other layer has
            changed.
    """

    name: str
    label: str
    score: float | None = None
    change: float
    flipped_share: float | None = None
    gap: float | None = None
    drift_std: float | None = None
    drift_log_variance: float | None = None
    drift_layer: str | None = None
    input_drift: float | None = None

    @property
    def drift(self) -> float | None:
        """The larger of the two drifts at the worst layer; NaN if one is not a number."""
        known = [d for d in (self.drift_std, self.drift_log_variance) if d is not None]
        return next((d for d in known if math.isnan(d)), max(known, default=None))


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the rows show to be the cause.

    Attributes:
        name: A stable name; ``"none"`` if nothing is wrong, ``"harmless"`` if something is off that
            does no harm on these data.
        message: What is wrong, and why the rows show it.
        evidence: The numbers, a line each.
        is_fault: Whether there is anything to fix.
        advice: What to do next.
        next_step: The same as code, or as a command, to paste.
        cured_by: Name of the row whose statistics are the cure, if any.
    """

    name: str
    message: str
    evidence: tuple[str, ...] = ()
    is_fault: bool = True
    advice: str
    next_step: str
    cured_by: str | None = None


@dataclass(frozen=True)
class LayerShare:
    """The part of one layer in the harm.

    Attributes:
        name: Dotted name of the layer.
        share: Share of the harm that its stored statistics do; 0 if they do none, or offset
            others. None if not measured.
        shift_std: Largest shift from the stored mean to that of the cure, in stored standard
            deviations; None if the stored statistics are not finite.
        log_variance_ratio: The log-variance ratio of the two that is furthest from 0.
    """

    name: str
    share: float | None
    shift_std: float | None
    log_variance_ratio: float | None


@dataclass(frozen=True, kw_only=True, repr=False)
class Diagnosis(ResultView):
    """The result of :func:`bnguard.diagnose`; prints itself.

    Attributes:
        rows: A row for each way to normalise, the stored statistics first; none for a model without
            running statistics, which is not run.
        cause: The verdict, with what to do next.
        layers: The layers to blame, the worst first; none without a cure to swap in.
        skipped: BN layers whose statistics were left as they are, and why.
        samples: Evaluation samples that were used.
        reference_samples: Training samples that were used; 0 without a reference.
        notes: What else a reader should know, a sentence each.
    """

    rows: tuple[Row, ...] = ()
    cause: Verdict
    layers: tuple[LayerShare, ...] = ()
    skipped: tuple[SkippedLayer, ...] = ()
    samples: int = 0
    reference_samples: int = 0
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> Row | None:
        """Return the row with a name; None if there is none."""
        return next((row for row in self.rows if row.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain data for JSON; see :mod:`bnguard.report.json_document`."""
        from bnguard.report.json_document import diagnosis_document

        return diagnosis_document(self)

    def __repr__(self) -> str:
        cause, samples = self.cause.name, self.samples
        return f"Diagnosis(cause={cause!r}, rows={len(self.rows)}, samples={samples})"

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [_heading(self)]
        if self.rows:
            parts.append(_rows_view(self.rows))
        parts.append(_cause_view(self.cause))
        if self.layers:
            parts.append(_layers_view(self.layers))
        parts += [
            Text(f"skipped: {layer.name or '(the model)'} {layer.reason}", style="yellow")
            for layer in self.skipped
        ]
        parts += [Text(f"note: {note}", style="dim") for note in self.notes]
        # Commands and code are copied: rich must not break their lines.
        code = Text(self.cause.next_step, style="bold", no_wrap=True, overflow="ignore")
        return Group(*parts, Text(f"→ {self.cause.advice}:"), code)


# The view fits 80 columns, and is readable without colour.
_MOST_LAYERS_SHOWN = 5
_VERDICTS = {
    "none": "no fault found",
    "harmless": "no harm on these data",
    "no-statistics": "nothing to compare",
}


def _heading(diagnosis: Diagnosis) -> Text:
    numbers = {"evaluation": diagnosis.samples, "training": diagnosis.reference_samples}
    parts = ["bnguard"]
    parts += [counted(n, f"{name} sample") for name, n in numbers.items() if n]
    return Text(" · ".join(parts), style="bold")


def _rows_view(rows: tuple[Row, ...]) -> RenderableType:
    has_score = any(row.score is not None for row in rows)
    has_flips = any(row.flipped_share is not None for row in rows)

    def numbers(row: Row) -> list[str]:
        known = [_score(row.score)] * has_score + [_share(row.flipped_share)] * has_flips
        return known + [_distance(d) for d in (row.change, row.gap, row.drift, row.input_drift)]

    headings = ["statistics"] + ["score"] * has_score + ["flips"] * has_flips
    headings += ["change", "gap", "drift", "first"]
    return Group(
        layer_table(headings, ((row.label, *numbers(row)) for row in rows)),
        Text(
            f"{'flips, ' * has_flips}change (σ): against the statistics of the evaluation data; "
            "gap (σ): against those of each batch; drift: from these statistics to the evaluation "
            "data at the worst layer, first: at the first one (σ of the mean, or logarithm of the "
            "variance ratio)",
            style="dim",
        ),
    )


def _cause_view(cause: Verdict) -> RenderableType:
    style = "bold yellow" if cause.is_fault else "bold"
    lines = Text()
    verdict = cause.name if cause.is_fault else _VERDICTS.get(cause.name, cause.name)
    lines.append(f"{verdict}: ", style=style)
    lines.append(cause.message)
    evidence = [Padding(Text(line, style="dim"), (0, 0, 0, 2)) for line in cause.evidence]
    return Group(lines, *evidence)


def _layers_view(layers: tuple[LayerShare, ...]) -> RenderableType:
    rows = (
        (
            layer.name or "(the model)",
            _share(layer.share, digits=0),
            *moved_text(layer.shift_std, layer.log_variance_ratio),
        )
        for layer in layers[:_MOST_LAYERS_SHOWN]
    )
    headings = ("layers to blame", "share of the harm", "shift, σ", "variance off by")
    return layer_table(headings, rows, len(layers) - _MOST_LAYERS_SHOWN)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _distance(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value < 100 else f"{value:.2g}"


def _share(value: float | None, digits: int = 1) -> str:
    # -0.0 is shown without its sign.
    return "–" if value is None else f"{round(value, digits + 2) + 0.0:.{digits}%}"
