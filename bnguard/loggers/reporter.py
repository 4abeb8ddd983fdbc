"""The protocol of everything that the results of a run are written to, and who calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from bnguard.errors import BNGuardError, in_one_line
from bnguard.findings import FindingGroup, show
from bnguard.loggers.scalars import Scalars, scalars_of
from bnguard.report import Report
from bnguard.rules import Rule


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


class RunLog:
    """Passes the results of a run to its reporters, and drops a reporter that raises an exception.

    Args:
        reporters: Where the results go.
        rules: The rules in force, whose limits the scalars are relative to.
        scalars: Which scalars are logged.
    """

    def __init__(
        self, reporters: Iterable[Reporter], rules: Iterable[Rule], scalars: Scalars = "summary"
    ) -> None:
        self._reporters = list(reporters)
        self._rules = tuple(rules)
        self._scalars = scalars

    @property
    def has_reporters(self) -> bool:
        """Whether anything is logged at all."""
        return bool(self._reporters)

    def write(self, report: Report, step: int) -> None:
        """Log the scalars and what is known of each layer at a step."""
        scalars = scalars_of(report, self._rules, self._scalars)
        if scalars:
            self._each(lambda reporter: reporter.log_scalars(scalars, step))
        self._each(lambda reporter: reporter.log_layers(report, step))

    def announce(self, groups: Sequence[FindingGroup], step: int) -> None:
        """Log findings that are new."""
        if groups:
            self._each(lambda reporter: reporter.log_findings(groups, step))

    def conclude(self, report: Report, step: int) -> None:
        """Log what is known when the run ends, and its report."""
        self.write(report, step)
        self._each(lambda reporter: reporter.log_report(report, step))

    def add_file(self, path: Path) -> None:
        """Keep a file with the run."""
        self._each(lambda reporter: reporter.log_file(path))

    def _each(self, log: Callable[[Reporter], None]) -> None:
        for reporter in tuple(self._reporters):
            try:
                log(reporter)
            except Exception as error:
                self._reporters.remove(reporter)
                show_failure(reporter, error)


def show_failure(logger: object, error: Exception) -> None:
    """Print why nothing more is logged to a logger or a reporter."""
    what = f"{type(logger).__name__} raised {in_one_line(error)}"
    if isinstance(error, BNGuardError):
        what = str(error)
    show(f"bnguard: {what}; nothing more is logged there, and the run goes on.")
