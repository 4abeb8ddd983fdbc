"""Writes scalars and findings as tables of CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bnguard.findings import FindingGroup
from bnguard.loggers.reporter import Reporter
from bnguard.loggers.table import COLUMNS, rows_of


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
