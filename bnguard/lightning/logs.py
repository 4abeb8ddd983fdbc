"""What the trainer's loggers are given: a few scalars, and the BatchNorm tab of TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence

from bnguard.lightning.framework import Trainer
from bnguard.lightning.proposals import subject_options
from bnguard.lightning.trainer import logged_step
from bnguard.monitor import Monitor
from bnguard.report import Report
from bnguard.rules import Rule
from bnguard.tensorboard.events import summary_writers
from bnguard.tensorboard.reports import ReportLog


class RunLog:
    """Writes to the loggers of a trainer, whichever they are and in any order; on rank zero only.

    Args:
        trainer: The trainer.
        rules: The rules in force.
    """

    def __init__(self, trainer: Trainer, rules: Sequence[Rule]) -> None:
        self._trainer = trainer
        self._loggers = trainer.loggers if trainer.is_global_zero else []
        writers = summary_writers(self._loggers)
        self._reports = ReportLog(writers, rules, subject_options(trainer))
        self._last_step: int | None = None

    def write(self, monitor: Monitor) -> None:
        """Write numbers and findings; once a step, of which accumulation makes several batches."""
        step = logged_step(self._trainer)
        if step == self._last_step or not self._loggers:
            return
        self._write(monitor.check(), step)

    def write_evaluation(self, monitor: Monitor) -> None:
        """Write what an evaluation told as well, down to each channel."""
        self._last_step = None
        self.write(monitor)
        if self._loggers:
            self._reports.add_channels(monitor.check(), logged_step(self._trainer))

    def conclude(self, report: Report) -> None:
        """Write the report that the run ends with, also at a step that was written."""
        if self._loggers:
            self._write(report, logged_step(self._trainer))

    def _write(self, report: Report, step: int) -> None:
        self._last_step = step
        self._reports.add(report, step)
        metrics = self._reports.scalars(report)
        for logger in self._loggers:
            logger.log_metrics(metrics, step=step)
