"""Prints results: findings when they first appear, and the report."""

from __future__ import annotations

from collections.abc import Sequence

from bnguard.findings import FindingGroup, show
from bnguard.loggers.reporter import Reporter
from bnguard.report import Report
from bnguard.report.terminal import as_terminal_text, notice_view


class Console(Reporter):
    """Prints to the standard output, above a progress bar if there is one."""

    def log_findings(self, groups: Sequence[FindingGroup], step: int) -> None:
        """Print two lines for the findings of each rule."""
        for group in groups:
            show(as_terminal_text(notice_view(group)))

    def log_report(self, report: Report, step: int) -> None:
        """Print the report."""
        show(as_terminal_text(report))
