"""Prints results: findings when they first appear, and the report."""

from __future__ import annotations

from collections.abc import Sequence

from bnguard.findings import FindingGroup, notice, show
from bnguard.loggers.reporter import Reporter
from bnguard.report import Report
from bnguard.report.terminal import as_terminal_text


class Console(Reporter):
    """Prints to the standard output, above a progress bar if there is one."""

    def log_findings(self, groups: Sequence[FindingGroup], step: int) -> None:
        """Print two lines for the findings of each rule."""
        for group in groups:
            show(notice(group))

    def log_report(self, report: Report, step: int) -> None:
        """Print the report."""
        show(as_terminal_text(report))
