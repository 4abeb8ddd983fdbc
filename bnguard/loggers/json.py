"""Writes the report into a file of JSON."""

from __future__ import annotations

from pathlib import Path

from bnguard.errors import BNGuardError
from bnguard.loggers.reporter import Reporter
from bnguard.report import Report
from bnguard.report.json_document import json_text

REPORT_FILE = "bnguard-report.json"


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
