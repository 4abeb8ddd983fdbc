"""Writes to a run of Weights & Biases; only a user who has one has imported wandb."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnguard.findings import Finding, FindingGroup, Severity, one_line
from bnguard.loggers.reporter import Reporter
from bnguard.loggers.scalars import PREFIX
from bnguard.loggers.text import COLUMNS, REPORT_FILE, rows_of
from bnguard.report import Report
from bnguard.report.json_document import json_text


class WeightsAndBiases(Reporter):
    """Logs scalars, a table of findings, an alert for each error, and the report as a file.

    Args:
        run: What ``wandb.init`` returned.
        step_name: The metric that the charts of the run have on their x axis.
    """

    def __init__(self, run: Any, step_name: str) -> None:
        self._run = run
        self._step_name = step_name
        self._findings: list[Finding] = []

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Log the scalars with the step of the user's own."""
        self._run.log({**scalars, self._step_name: step})

    def log_findings(self, groups: Sequence[FindingGroup], step: int) -> None:
        """Log a table of the findings so far, and send an alert for what is an error."""
        self._findings += [finding for group in groups for finding in group.findings]
        self._log_table(self._findings, step)
        for group in groups:
            worst = group.worst
            if worst.severity is Severity.ERROR:
                title = f"bnguard: {worst.code} {worst.name}"
                self._run.alert(title=title, text=one_line(group), level="ERROR")

    def log_report(self, report: Report, step: int) -> None:
        """Log a table of the findings that the report has, and the report as a file of JSON."""
        self._log_table(report.findings, step)
        (Path(self._run.dir) / REPORT_FILE).write_text(json_text(report), "utf-8")

    def log_file(self, path: Path) -> None:
        """Upload a file."""
        self._run.save(str(path), base_path=str(path.parent), policy="now")

    def _log_table(self, findings: Iterable[Finding], step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(COLUMNS), data=rows_of(findings))
        self._run.log({f"{PREFIX}/table": table, self._step_name: step})
