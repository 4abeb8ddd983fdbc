"""The protocol of everything that the results of a run are written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from bnguard.findings import FindingGroup
from bnguard.report import Report


class Reporter:
    """Writes the results of a run somewhere; a method that a subclass leaves out does nothing.

    An exception in a method ends the reporting to this reporter, with one line, and not the run.

    Example:
        >>> class Counter(Reporter):
        ...     total = 0
        ...
        ...     def log_findings(self, groups, step):
        ...         self.total += len(groups)
        >>> Counter().log_scalars({"zz_bnguard/shift": 0.4}, step=10)
    """

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Log a few numbers, by name, at a logging step; see :mod:`bnguard.loggers.scalars`."""

    def log_layers(self, report: Report, step: int) -> None:
        """Log what is known of each layer so far, at a logging step."""

    def log_findings(self, groups: Sequence[FindingGroup], step: int) -> None:
        """Log findings of severity ``warning`` or ``error`` when they first appear, each once."""

    def log_report(self, report: Report, step: int) -> None:
        """Log the report of the run when it ends."""

    def log_file(self, path: Path) -> None:
        """Keep a file with the run, such as a page of HTML."""
