"""Reports, and their views: terminal, notebook, picture, JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bnguard.findings import (
    Finding,
    FindingGroup,
    PastFinding,
    Severity,
    Skipped,
    counted,
    group_findings,
)
from bnguard.observe.history import History, LayerHistory
from bnguard.report.notes import list_notes
from bnguard.report.picture import Moment
from bnguard.report.views import ResultView

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import RenderableType


@dataclass(frozen=True, repr=False)
class Report(ResultView):
    """What was observed of a model and what is wrong with it; prints itself.

    Attributes:
        history: What was observed.
        findings: What is wrong, the worst first, each root cause before what it explains.
        skipped: What is unknown, and why.
        over: What was announced during training and is gone.
        failure: The error inside bnguard that ended the watching early; None if there was none.
        course: What was measured during training, the newest last.
        checkpoint: The file or folder that was inspected; None for a model or a state dict.

    Example:
        >>> from bnguard.observe.history import History, Run
        >>> print(Report(History(layers=(), run=Run(steps=9)), findings=(), skipped=()))
        bnguard · 0 BN layers · 9 steps · no problems found
        note: no evaluation (eval mode, no_grad) was seen, so BN301, BN302 and BN305
        were not judged
        >>> Report(History(layers=(), run=Run(steps=9)), findings=(), skipped=())
        Report(0 BN layers, 9 steps, no findings)
    """

    history: History
    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...]
    failure: str | None = None
    over: tuple[PastFinding, ...] = ()
    course: tuple[Moment, ...] = ()
    checkpoint: Path | None = None

    @property
    def layers(self) -> tuple[LayerHistory, ...]:
        """What was observed, layer by layer."""
        return self.history.layers

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read in an unusual way, or could not be seen, and why; a line each."""
        notes = tuple(list_notes(self.history))
        return notes if self.failure is None else (self.failure, *notes)

    @property
    def groups(self) -> tuple[FindingGroup, ...]:
        """The findings, grouped by rule and severity."""
        return group_findings(self.findings)

    @property
    def worst_severity(self) -> Severity | None:
        """The highest severity among the findings; None if there are none."""
        return max((finding.severity for finding in self.findings), default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON; see :mod:`bnguard.report.json_document`."""
        from bnguard.report.json_document import report_document

        return report_document(self)

    def plot(self) -> Figure:
        """Draw layers by steps: what the first finding measured, its limit, and the verdict.

        Of a healthy run it is the drift of the running statistics. Save the figure of matplotlib
        with ``report.plot().savefig("bn.png")``.

        Raises:
            ConfigurationError: matplotlib is not installed (extra ``plot``).
        """
        from bnguard.report.picture import draw

        return draw(self)

    def __repr__(self) -> str:
        steps = self.history.run.steps
        parts = [counted(len(self.layers), "BN layer")]
        parts += [counted(steps, "step")] if steps else []
        for severity in reversed(Severity):
            codes = [group.worst.code for group in self.groups if group.worst.severity is severity]
            number = sum(finding.severity is severity for finding in self.findings)
            if number:
                codes = list(dict.fromkeys(codes))
                parts.append(f"{counted(number, str(severity))}: {', '.join(codes)}")
        return f"Report({', '.join(parts if self.findings else [*parts, 'no findings'])})"

    def __rich__(self) -> RenderableType:
        from bnguard.report.terminal import report_view

        return report_view(self)
