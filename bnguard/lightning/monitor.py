"""The callback that watches, a thin adapter over :mod:`bnguard.monitor`, and what loggers get."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from bnguard.configuration import read_configuration
from bnguard.distributed import number_of_ranks
from bnguard.errors import ConfigurationError, UserCodeError, user_code
from bnguard.findings import Finding, FindingGroup, Severity, counted, notice, show
from bnguard.layers.bn_layer import find_layers
from bnguard.lightning.commands import commands, subject_options
from bnguard.lightning.framework import LightningModule, Trainer
from bnguard.lightning.trainer import (
    GuardedCallback,
    guarded,
    is_fitting,
    is_last_batch,
    is_logging_step,
    is_rehearsal,
    log_folder,
    logged_step,
    planned_batches,
    unlogged,
)
from bnguard.monitor import Monitor, watch
from bnguard.report import Report
from bnguard.report.json_document import REPORT_FILE, write_document
from bnguard.report.terminal import as_terminal_text
from bnguard.rules import Rule
from bnguard.rules.engine import Announcements
from bnguard.tensorboard.events import summary_writers
from bnguard.tensorboard.writer import ReportLog

_STOP_LEVELS = (None, "error", "warning")
_REPORTS = ("terminal", "file", "both", "none")


class BatchNormMonitor(GuardedCallback):
    """Watches the BN layers during ``fit``, and says what is wrong with them.

    A finding is printed once, when it first appears; a few scalars go to every logger of the
    trainer at its logging steps, the findings as text to TensorBoard; the report is printed when
    ``fit`` ends, and written as ``bnguard-report.json`` into the first folder that a logger has.
    ``validate``, ``test`` and ``predict`` are watched as well.

    Where several processes train, each watches its own batches; what they find is brought together
    every ``every_n_steps`` batches and at the end, and rank zero prints and writes it. A finding
    that not all of them have says which do. A rank that has ended or failed is not waited for.

    An error inside bnguard does not end the run: it is printed, and the callback turns off.

    Args:
        every_n_steps: How often the rules run, in training batches; besides, they do after the
            first batch and after each validation.
        eval_batches: Validation batches that are read in each validation; more where they are
            small.
        rules: The rules to run; all by default.
        select: Those of them that run, by code, name or prefix of a code (``"BN3"``). This and the
            next three go before what ``[tool.bnguard]`` of ``pyproject.toml`` says.
        ignore: Those that do not run, also where they are selected.
        per_layer_ignores: Those that say nothing of some layers, by glob of the layers' names.
        limits: Limits that differ from those of the rules, by rule, then by name.
        restore_poisoned: Put the last finite statistics back in the step that poisons them.
        stop_on: Stop the trainer when a finding so severe appears. That is when the rules run
            and not before: ``every_n_steps=1`` stops it after the very batch, at a price.
        report: Where the report goes when ``fit`` ends: printed, written, both or neither.
        strict: Raise errors inside bnguard; for tests.

    Attributes:
        report: The report of the run that ended last; None before.

    Raises:
        ConfigurationError: An option, a rule or a limit does not exist.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[BatchNormMonitor()], logger=False)
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        eval_batches: int = 8,
        rules: Iterable[Rule] | None = None,
        select: Collection[str] | None = None,
        ignore: Collection[str] | None = None,
        per_layer_ignores: Mapping[str, Collection[str]] | None = None,
        limits: Mapping[str, Mapping[str, float]] | None = None,
        restore_poisoned: bool = False,
        stop_on: Literal["error", "warning"] | None = None,
        report: Literal["terminal", "file", "both", "none"] = "both",
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        # What is wrong with these is to be told before the run, not at its start.
        read_configuration().changed(
            select=select, ignore=ignore, per_layer_ignores=per_layer_ignores, limits=limits
        )
        _known("stop_on", stop_on, _STOP_LEVELS)
        _known("report", report, _REPORTS)
        self.report: Report | None = None
        self._every_n_steps = max(1, every_n_steps)
        self._eval_batches = eval_batches
        self._rules = None if rules is None else tuple(rules)
        self._select = select
        self._ignore = ignore
        self._per_layer_ignores = per_layer_ignores
        self._limits = limits
        self._restore_poisoned = restore_poisoned
        self._stop_level = None if stop_on is None else Severity[stop_on.upper()]
        self._is_printed = report in ("terminal", "both")
        self._is_written = report in ("file", "both")
        self._monitor: Monitor | None = None
        self._evaluation = ExitStack()
        self._has_evaluated = False
        self._batches = 0
        self._untold: list[Finding] = []
        # Of all ranks together; the monitor has those of its own.
        self._announcements = Announcements()
        self._log: RunLog | None = None
        self._momenta: dict[str, float | None] = {}
        self._eps: dict[str, float] = {}
        # Of the run that this one goes on from; and of the one that ended last.
        self._before: dict[str, Any] | None = None
        self._ended: dict[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what watches a model right now: a copy watches from its own next run on."""
        return {**vars(self), "_monitor": None, "_evaluation": ExitStack(), "_log": None}

    def state_dict(self) -> dict[str, Any]:
        """Return momentum and eps of each layer, the findings, and what lets a run be resumed."""
        return self._state() or {}

    @guarded
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an interrupted run knew, when training begins."""
        self._before = state_dict.get("monitor")
        self._announcements = Announcements(state_dict.get("findings", ()))

    @guarded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch, with weights restored and moved, and after the sanity check."""
        before, self._before = self._before, None
        self._announcements = Announcements(() if before is None else self._announcements.records)
        self._batches, self._untold = 0, []
        monitor = self._watch(trainer, pl_module, planned_batches(trainer))
        if monitor is None:
            return
        if before is not None:
            monitor.load_state_dict(before)
        self._log = RunLog(trainer, monitor.rules)
        if self._is_printed and trainer.is_global_zero and not is_rehearsal(trainer):
            show(self._greeting(trainer))

    @guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Take the statistics as they are after an evaluation, whatever it did to them."""
        if self._has_evaluated:
            self._has_evaluated = False
            self.forget_changes()

    @guarded
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Read what the batch left in the buffers, and log at the trainer's logging steps."""
        if self._monitor is None:
            return
        self._monitor.step(logged_step(trainer) + 1)
        if self._log is not None and is_logging_step(trainer):
            self._log.write(self._monitor)
        self._batches += 1
        if self._batches % self._every_n_steps == 0:
            self._exchange(trainer)

    @guarded
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to read what arrives in eval mode."""
        self._begin_evaluation(trainer, pl_module)

    @guarded
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop reading after the last batch, before averaged weights make way for the others."""
        if is_last_batch(trainer, batch_idx, dataloader_idx):
            self._evaluation.close()

    @guarded
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold what arrived in eval mode against the running statistics."""
        self._end_evaluation(trainer)

    @guarded
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to read what arrives in eval mode."""
        self._begin_evaluation(trainer, pl_module)

    @guarded
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold what arrived in eval mode against the running statistics."""
        self._end_evaluation(trainer)

    @guarded
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to read what arrives in eval mode."""
        self._begin_evaluation(trainer, pl_module)

    @guarded
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold what arrived in eval mode against the running statistics."""
        self._end_evaluation(trainer)

    @guarded
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show and write the report."""
        self._conclude(trainer)

    @guarded
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Show and write the report of a run that ends early, Ctrl-C included.

        Each rank tells its own: the others may never come here.
        """
        if self._monitor is None:
            return
        self._monitor._leave()
        self._tell(trainer, self._untold, rank=trainer.global_rank)
        self._untold = []
        # Not as at its end, where the module is run again.
        self._evaluation.__exit__(type(exception), exception, exception.__traceback__)
        self._end(trainer, self._monitor, self._monitor.report())

    @guarded
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        self.let_go()

    def let_go(self) -> None:
        """Take the hooks off, and let the other ranks go on without this one."""
        monitor, self._monitor = self._monitor, None
        try:
            self._evaluation.close()
        finally:
            if monitor is not None:
                monitor._leave()
                monitor.close()

    @guarded
    def forget_changes(self) -> None:
        """Take the running statistics as they are now, whatever changed them since."""
        if self._monitor is not None:
            self._monitor.forget_changes()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing of what runs inside: it is a repair, and not the user's training."""
        with ExitStack() as stack:
            if self._monitor is not None:
                stack.enter_context(self._monitor._paused())
            yield

    @guarded
    def _state(self) -> dict[str, Any]:
        state = self._ended
        if self._monitor is not None:
            state = self._monitor.state_dict()
            self._announcements.note(self._monitor.check().findings, state["step"])
        return {
            "momentum": self._momenta,
            "eps": self._eps,
            "findings": self._announcements.records,
            "monitor": state,
        }

    def _watch(
        self, trainer: Trainer, pl_module: LightningModule, planned_steps: int | None
    ) -> Monitor | None:
        """Begin to watch; a module without BN layers is left alone, and said to be in one line."""

        def note(group: FindingGroup) -> None:
            self._untold.extend(group.findings)
            if number_of_ranks() == 1:
                self._exchange(trainer)

        layers = find_layers(pl_module)
        self._momenta = {layer.name: layer.momentum for layer in layers}
        self._eps = {layer.name: layer.eps for layer in layers}
        if not self._momenta:
            if trainer.is_global_zero:
                name = type(pl_module).__name__
                show(f"bnguard: {name} has no BN layers, so there is nothing to watch")
            return None
        self._monitor = watch(
            pl_module,
            optimizer=trainer.optimizers,
            every_n_steps=self._every_n_steps,
            eval_batches=self._eval_batches,
            planned_steps=planned_steps,
            loader=trainer.train_dataloader,
            accumulated_batches=trainer.accumulate_grad_batches,
            rules=self._rules,
            select=self._select,
            ignore=self._ignore,
            per_layer_ignores=self._per_layer_ignores,
            limits=self._limits,
            restore_poisoned=self._restore_poisoned,
            on_findings=note,
            # The edge to the run is here.
            strict=True,
        )
        self._monitor._expect_calls()
        return self._monitor

    def _begin_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self._monitor is None and not is_fitting(trainer):
            self._watch(trainer, pl_module, None)
        if self._monitor is not None:
            self._evaluation.enter_context(_watched_evaluation(self._monitor, pl_module))
            self._has_evaluated = True

    def _end_evaluation(self, trainer: Trainer) -> None:
        if trainer.sanity_checking or self._monitor is None:
            return
        self._evaluation.close()
        if not is_fitting(trainer):
            self._conclude(trainer)
            return
        if self._log is not None:
            self._log.write_evaluation(self._monitor)
        self._exchange(trainer)

    def _conclude(self, trainer: Trainer) -> None:
        """Tell what is new, show and write the report, and watch no longer."""
        if self._monitor is None:
            return
        self._exchange(trainer)
        self._end(trainer, self._monitor, self._monitor.report_of_all_ranks())

    def _end(self, trainer: Trainer, monitor: Monitor, report: Report) -> None:
        """Log and show the report, and watch no longer."""
        # What a later checkpoint of the run should hold.
        self._ended = monitor.state_dict()
        self._announcements.note(report.findings, self._ended["step"])
        log, self._log = self._log, None
        self.let_go()
        if log is not None:
            log.conclude(report)
        self._present(trainer, report)

    def _exchange(self, trainer: Trainer) -> None:
        """Tell what is new on all ranks: each comes here as often as the others."""
        mine, self._untold = self._untold, []
        if self._monitor is not None:
            self._tell(trainer, self._monitor._findings_of_all_ranks(mine))

    def _tell(self, trainer: Trainer, findings: Iterable[Finding], rank: int = 0) -> None:
        groups = self._announcements.new(findings)
        for group in groups:
            self._announcements.note(group.findings, logged_step(trainer) + 1)
        if trainer.global_rank == rank:
            for group in groups:
                show(notice(group))
        if self._stop_level is None or trainer.should_stop:
            return
        reason = next((g.worst for g in groups if g.worst.severity >= self._stop_level), None)
        if reason is not None:
            trainer.should_stop = True
            if trainer.is_global_zero:
                show(f"bnguard: stopping the trainer because of {reason.code}")

    def _present(self, trainer: Trainer, report: Report) -> None:
        self.report = report
        if not trainer.is_global_zero or is_rehearsal(trainer):
            return
        folder = log_folder(trainer)
        if self._is_printed:
            show("\n".join([as_terminal_text(report), *commands(trainer, report)]))
        if self._is_written and folder is not None:
            file = folder / REPORT_FILE
            # A later ``validate`` knows nothing of the training that ``fit`` reported.
            if is_fitting(trainer) or not file.exists():
                try:
                    write_document(report, file)
                except OSError as error:
                    show(f"bnguard: {file} cannot be written: {error.strerror}")

    def _greeting(self, trainer: Trainer) -> str:
        folder = log_folder(trainer) if self._is_written else None
        where = "" if folder is None else f", and in {folder / REPORT_FILE}"
        ranks = number_of_ranks()
        who = "" if ranks == 1 else f" on each of {ranks} ranks"
        return (
            f"bnguard · watching {counted(len(self._momenta), 'BN layer')}{who} · findings appear "
            f"here, the report at the end{where}"
        )


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


@contextmanager
def _watched_evaluation(monitor: Monitor, module: LightningModule) -> Iterator[None]:
    """Watch an evaluation, at whose end the module is run again, and is to log nothing then."""
    with ExitStack() as at_end, monitor.evaluation():
        yield
        at_end.enter_context(unlogged(module))


def _known(option: str, value: object, known: Collection[object]) -> None:
    if value not in known:
        raise ConfigurationError(f"{option}={value!r} is unknown: use one of {known}")
