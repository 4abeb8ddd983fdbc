"""Writes results as text: on the console, as tables of CSV, as a file of JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bnguard.errors import BNGuardError
from bnguard.findings import Finding, FindingGroup, show
from bnguard.loggers.reporter import Reporter
from bnguard.report import Report
from bnguard.report.json_document import json_text
from bnguard.report.terminal import as_terminal_text, notice_view

COLUMNS = ("step", "code", "name", "severity", "layer", "message", "evidence", "fix")
REPORT_FILE = "bnguard-report.json"


class Console(Reporter):
    """Prints to the standard output, above a progress bar if there is one."""

    def log_findings(self, groups: Sequence[FindingGroup], step: int) -> None:
        """Print two lines for the findings of each rule."""
        for group in groups:
            show(as_terminal_text(notice_view(group)))

    def log_report(self, report: Report, step: int) -> None:
        """Print the report."""
        show(as_terminal_text(report))


class CSV(Reporter):
    """Appends to ``bnguard-scalars.csv`` and ``bnguard-findings.csv`` in a folder.

    Args:
        folder: The folder; it is created if it does not exist.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Append a row for each scalar."""
        rows = ([step, name, value] for name, value in scalars.items())
        self._append("bnguard-scalars.csv", ("step", "name", "value"), rows)

    def log_findings(self, groups: Sequence[FindingGroup], step: int) -> None:
        """Append a row for each finding."""
        rows = rows_of(finding for group in groups for finding in group.findings)
        self._append("bnguard-findings.csv", COLUMNS, rows)

    def _append(self, name: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        file = self._folder / name
        is_new = not file.exists()
        with file.open("a", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerows([header, *rows] if is_new else rows)


class JSON(Reporter):
    """Writes the report as ``bnguard-report.json`` into a folder.

    Args:
        folder: The folder, which exists.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / REPORT_FILE

    def log_report(self, report: Report, step: int) -> None:
        """Write the report, in place of an earlier one."""
        try:
            self.path.write_text(json_text(report), "utf-8")
        except OSError as error:
            raise BNGuardError(f"{self.path} cannot be written: {error.strerror}") from None


def rows_of(findings: Iterable[Finding]) -> list[list[str]]:
    """Return a row of text for each finding, in the order of ``COLUMNS``."""
    return [
        [
            "" if finding.step is None else str(finding.step),
            finding.code,
            finding.name,
            str(finding.severity),
            "the model" if finding.layer is None else finding.layer,
            finding.message,
            str(finding.evidence),
            finding.fix.summary,
        ]
        for finding in findings
    ]
