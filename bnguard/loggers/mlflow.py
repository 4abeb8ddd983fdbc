"""Writes to a run of MLflow, through the client that the user's logger has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bnguard.findings import FindingGroup, one_line
from bnguard.loggers.reporter import Reporter
from bnguard.loggers.text import REPORT_FILE
from bnguard.report import Report
from bnguard.report.json_document import json_text


class MLflow(Reporter):
    """Logs metrics, the findings as text, and the report as artifacts of text and JSON.

    Args:
        client: An ``mlflow.MlflowClient``.
        run_id: The run; it may have ended.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self._client = client
        self._run_id = run_id
        self._lines: list[str] = []

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Log a metric for each scalar."""
        for name, value in scalars.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def log_findings(self, groups: Sequence[FindingGroup], step: int) -> None:
        """Log ``bnguard-findings.txt``, with a line for the findings of each rule so far."""
        self._lines += map(one_line, groups)
        self._client.log_text(self._run_id, "\n".join(self._lines) + "\n", "bnguard-findings.txt")

    def log_report(self, report: Report, step: int) -> None:
        """Log ``bnguard-report.txt`` and ``bnguard-report.json``."""
        self._client.log_text(self._run_id, f"{report}\n", "bnguard-report.txt")
        self._client.log_text(self._run_id, json_text(report), REPORT_FILE)

    def log_file(self, path: Path) -> None:
        """Log a file as an artifact."""
        self._client.log_artifact(self._run_id, str(path))
