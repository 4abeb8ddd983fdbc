"""What the trainer's loggers are given: a few scalars, and the BatchNorm tab of TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bnguard.errors import UserCodeError, user_code
from bnguard.lightning.commands import subject_options
from bnguard.lightning.framework import Trainer
from bnguard.lightning.trainer import logged_step
from bnguard.monitor import Monitor
from bnguard.report import Report
from bnguard.report.lines import show
from bnguard.rules import Rule
from bnguard.tensorboard.events import summary_writers
from bnguard.tensorboard.writer import ReportLog


class RunLog:
    """Writes to the loggers of a trainer, whichever they are and in any order; on rank zero only.

    Args:
        trainer: The trainer.
        rules: The rules in force.
    """

    def __init__(self, trainer: Trainer, rules: Sequence[Rule]) -> None:
        self._trainer = trainer
        subjects = subject_options(trainer)
        self._reports: list[tuple[Any, ReportLog]] = []
        for logger in trainer.loggers if trainer.is_global_zero else ():
            with self._dropped_on_error(logger):
                with user_code(type(logger).__name__):
                    writers = summary_writers([logger])
                self._reports.append((logger, ReportLog(writers, rules, subjects)))
        self._last_step: int | None = None

    def write(self, monitor: Monitor) -> None:
        """Write numbers and findings; once a step, of which accumulation makes several batches."""
        step = logged_step(self._trainer)
        if step == self._last_step or not self._reports:
            return
        self._write(monitor.check(), step)

    def write_evaluation(self, monitor: Monitor) -> None:
        """Write what an evaluation told as well, down to each channel."""
        self._last_step = None
        self.write(monitor)
        for logger, reports in tuple(self._reports):
            with self._dropped_on_error(logger):
                reports.add_channels(monitor.check(), logged_step(self._trainer))

    def conclude(self, report: Report) -> None:
        """Write the report that the run ends with, also at a step that was written."""
        self._write(report, logged_step(self._trainer))

    def _write(self, report: Report, step: int) -> None:
        self._last_step = step
        for logger, reports in tuple(self._reports):
            with self._dropped_on_error(logger):
                reports.add(report, step)
                metrics = reports.scalars(report)
                with user_code(type(logger).__name__):
                    logger.log_metrics(metrics, step=step)

    @contextmanager
    def _dropped_on_error(self, logger: object) -> Iterator[None]:
        """Log to a logger no longer once it has raised an error, and say so."""
        try:
            yield
        except UserCodeError as error:
            self._reports = [pair for pair in self._reports if pair[0] is not logger]
            show(f"bnguard: {error}; nothing more is logged there, and the run goes on.")
