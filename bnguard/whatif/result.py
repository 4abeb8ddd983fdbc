"""What a diagnosis found: a row for each way to normalise, the cause, and the layers to blame."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bnguard.recalibration.selection import SkippedLayer

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, kw_only=True)
class Row:
    """How the model does when it normalises in one way.

    Attributes:
        name: ``"stored"``, ``"reference"``, ``"averaged"``, ``"evaluation"``, ``"batches"``,
            ``"batches of 8"`` or ``"shuffled batches"``.
        label: The same in words.
        score: What ``score`` gave; None without one, or where its batches are too small.
        change: How far the outputs are from those with the statistics of the evaluation data:
            root mean square, in standard deviations of these.
        flipped_share: Share of the predictions that differ from those; None where the outputs are
            no class scores.
        gap: How far the outputs are from those with the statistics of each batch, as ``change``;
            None where batches have none.
        drift_std: How far the evaluation data are from the statistics, in their standard
            deviations: the shift of the mean that nine channels of ten stay below, at the worst
            layer; None where there are no running statistics.
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
        """The larger of the two drifts at the worst layer; NaN where one is not a number."""
        known = [d for d in (self.drift_std, self.drift_log_variance) if d is not None]
        return next((d for d in known if math.isnan(d)), max(known, default=None))


@dataclass(frozen=True, kw_only=True)
class Cause:
    """What the rows name as the cause.

    Attributes:
        name: A name that stays the same; ``"none"`` where nothing is wrong, ``"harmless"`` where
            something is off that does no harm on these data.
        message: What is wrong, and why the rows say so.
        evidence: The numbers that speak for it, a line each.
        is_fault: Whether there is anything to mend.
        advice: What to do next.
        next_step: The same as code, or as a command, to be pasted.
        cured_by: Name of the row whose statistics are the cure; None where none are.
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
    """What one layer has to do with it.

    Attributes:
        name: Dotted name of the layer.
        share: Share of the harm that its stored statistics do; 0 where they do none, or make up
            for others. None where it was not measured.
        shift_std: Largest shift from the stored mean to that of the cure, in stored standard
            deviations; None where the stored statistics are not finite.
        log_variance_ratio: The log-variance ratio of the two that is furthest from 0.
    """

    name: str
    share: float | None
    shift_std: float | None
    log_variance_ratio: float | None


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What :func:`bnguard.diagnose` found; prints itself.

    Attributes:
        rows: A row for each way to normalise, the stored statistics first.
        cause: The cause that they name, with what to do next.
        layers: The layers to blame, the worst first; none where there is no cure to swap in.
        skipped: BN layers whose statistics were left as they are, and why.
        samples: Evaluation samples that were used.
        reference_samples: Training samples that were used; 0 without a reference.
        notes: What a reader should know besides, a sentence each.
    """

    rows: tuple[Row, ...]
    cause: Cause
    layers: tuple[LayerShare, ...]
    skipped: tuple[SkippedLayer, ...]
    samples: int
    reference_samples: int
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> Row | None:
        """Return the row of a name; None where there is none."""
        return next((row for row in self.rows if row.name == name), None)

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain data for JSON; see :mod:`bnguard.report.json_document`."""
        from bnguard.report.json_document import diagnosis_document

        return diagnosis_document(self)

    def __rich__(self) -> RenderableType:
        from bnguard.report.diagnosis import diagnosis_view

        return diagnosis_view(self)

    def __str__(self) -> str:
        from bnguard.report.terminal import as_text

        return as_text(self)
