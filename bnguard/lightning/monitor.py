"""The callback that watches: a thin adapter over :mod:`bnguard.monitor`."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import rich

from bnguard.findings import Finding, FindingGroup, Severity, group_findings
from bnguard.layers import find_layers
from bnguard.lightning.framework import LightningModule, Trainer
from bnguard.lightning.guard import GuardedCallback, guarded
from bnguard.lightning.logs import RunLog
from bnguard.lightning.ranks import gather, merge_findings, merge_reports, number_of_ranks
from bnguard.lightning.trainer import (
    class_path,
    datamodule_of,
    is_fitting,
    is_last_batch,
    is_logging_step,
    is_rehearsal,
    log_folder,
    logged_step,
    newest_checkpoint,
    planned_batches,
    show,
)
from bnguard.monitor import Monitor, one_line, watch
from bnguard.report import Report
from bnguard.report.document import write_document
from bnguard.rules import RULES, Rule

REPORT_FILE = "bnguard-report.json"


class BatchNormMonitor(GuardedCallback):
    """Watches the BN layers during ``fit``, and says what is wrong with them.

    A finding is printed once, when it first appears; a few scalars go to every logger of the
    trainer at its logging steps, the findings as text to TensorBoard; the report is printed when
    ``fit`` ends, and written as ``bnguard-report.json`` into the first folder that a logger has.
    ``validate``, ``test`` and ``predict`` are watched as well.

    Where several processes train, each watches its own batches; what they find is brought together
    every ``every_n_steps`` batches and at the end, and rank zero prints and writes it. A finding
    that not all of them have says which do.

    An error inside bnguard does not end the run: it is printed, and the callback turns off.

    Args:
        every_n_steps: How often the rules run, in training batches.
        eval_batches: Validation batches that are read in each validation.
        rules: The rules to run.
        restore_poisoned: Put the last finite statistics back in the step that poisons them.
        stop_on: Stop the trainer after the step in which a finding so severe appears.
        report: Where the report goes when ``fit`` ends: printed, written, both or neither.
        strict: Raise errors inside bnguard; for tests.

    Attributes:
        report: The report of the run that ended last; None before.

    Example:
        >>> from pytorch_lightning import Trainer
        >>> trainer = Trainer(callbacks=[BatchNormMonitor()], logger=False)
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        eval_batches: int = 8,
        rules: Iterable[Rule] = RULES,
        restore_poisoned: bool = False,
        stop_on: Literal["error", "warning"] | None = None,
        report: Literal["terminal", "file", "both", "none"] = "both",
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        self.report: Report | None = None
        self._every_n_steps = max(1, every_n_steps)
        self._eval_batches = eval_batches
        self._rules = tuple(rules)
        self._restore_poisoned = restore_poisoned
        self._stop_level = None if stop_on is None else Severity[stop_on.upper()]
        self._is_printed = report in ("terminal", "both")
        self._is_written = report in ("file", "both")
        self._monitor: Monitor | None = None
        self._evaluation = ExitStack()
        self._has_evaluated = False
        self._batches = 0
        self._untold: list[Finding] = []
        self._told: set[tuple[str, Severity, str | None]] = set()
        self._log: RunLog | None = None
        self._momenta: dict[str, float | None] = {}
        self._resumed: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return the momentum of each layer, and what lets a resumed run go on as one."""
        monitored = self._resumed if self._monitor is None else self._monitor.state_dict()
        return {"momentum": self._momenta, "monitor": monitored}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what an interrupted run knew, when training begins."""
        self._resumed = state_dict.get("monitor")

    @guarded
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch, with weights restored and moved, and after the sanity check."""
        self._watch(trainer, pl_module, planned_batches(trainer))
        if self._monitor is not None and self._resumed is not None:
            self._monitor.load_state_dict(self._resumed)
        if self._is_printed and trainer.is_global_zero and not is_rehearsal(trainer):
            show(trainer, self._greeting(trainer))

    @guarded
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Take the statistics as they are after an evaluation, whatever it did to them."""
        if self._has_evaluated:
            self._has_evaluated = False
            self.forget_changes()

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Read what the batch left in the buffers, and log at the trainer's logging steps."""
        self._step(trainer)
        self._batches += 1
        # Not guarded: a rank that has turned itself off must still come where the others wait.
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

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold what arrived in eval mode against the running statistics."""
        self._end_evaluation(trainer)

    @guarded
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to read what arrives in eval mode."""
        self._begin_evaluation(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold what arrived in eval mode against the running statistics."""
        self._end_evaluation(trainer)

    @guarded
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to read what arrives in eval mode."""
        self._begin_evaluation(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold what arrived in eval mode against the running statistics."""
        self._end_evaluation(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show and write the report."""
        self._exchange(trainer)
        self._present(trainer, gather(self._final_report(trainer)))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Show and write the report of a run that ends early, Ctrl-C included.

        Each rank tells its own: the others may never come here.
        """
        self._tell(trainer, self._untold, rank=trainer.global_rank)
        self._untold = []
        self._present(trainer, [self._final_report(trainer)])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        self.let_go()

    def let_go(self) -> None:
        """Take the hooks off."""
        self._evaluation.close()
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

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
                stack.enter_context(self._monitor.paused())
            yield

    def _watch(
        self, trainer: Trainer, pl_module: LightningModule, planned_steps: int | None
    ) -> Monitor:
        def note(group: FindingGroup) -> None:
            self._untold.extend(group.findings)
            if number_of_ranks() == 1:
                self._exchange(trainer)

        self._monitor = watch(
            pl_module,
            optimizer=trainer.optimizers,
            every_n_steps=self._every_n_steps,
            eval_batches=self._eval_batches,
            planned_steps=planned_steps,
            loader=trainer.train_dataloader,
            accumulated_batches=trainer.accumulate_grad_batches,
            rules=self._rules,
            restore_poisoned=self._restore_poisoned,
            on_findings=note,
        )
        self._momenta = {layer.name: layer.momentum for layer in find_layers(pl_module)}
        if is_fitting(trainer):
            self._log = RunLog(trainer, self._rules)
        return self._monitor

    @guarded
    def _step(self, trainer: Trainer) -> None:
        if self._monitor is None:
            return
        self._monitor.step(logged_step(trainer) + 1)
        if self._log is not None and is_logging_step(trainer):
            self._log.write(self._monitor)

    def _begin_evaluation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        monitor = self._monitor or self._watch(trainer, pl_module, None)
        self._evaluation.enter_context(monitor.evaluation())
        self._has_evaluated = True

    def _end_evaluation(self, trainer: Trainer) -> None:
        if trainer.sanity_checking:
            return
        self._close_evaluation()
        self._exchange(trainer)
        if not is_fitting(trainer):
            self._present(trainer, gather(self._final_report(trainer)))

    @guarded
    def _close_evaluation(self) -> None:
        self._evaluation.close()
        if self._monitor is not None and self._log is not None:
            self._log.write_evaluation(self._monitor)

    @guarded
    def _final_report(self, trainer: Trainer) -> Report | None:
        """Return what this rank knows at the end, and watch no longer."""
        monitor = self._monitor
        if monitor is None:
            return None
        self._evaluation.close()
        if self._log is not None:
            self._log.write(monitor)
        report = monitor.report()
        self._resumed = monitor.state_dict()
        self._log = None
        self.let_go()
        return report

    def _exchange(self, trainer: Trainer) -> None:
        """Bring what is new on all ranks together: each comes here as often as the others."""
        by_rank = gather(self._untold)
        self._untold = []
        self._tell(trainer, merge_findings(by_rank))

    @guarded
    def _tell(self, trainer: Trainer, findings: Iterable[Finding], rank: int = 0) -> None:
        new = [finding for finding in findings if finding.key not in self._told]
        self._told.update(finding.key for finding in new)
        for group in group_findings(new):
            if trainer.global_rank == rank:
                show(trainer, f"bnguard: {group.worst.severity}: {one_line(group)}")
            if self._stop_level is not None and group.worst.severity >= self._stop_level:
                trainer.should_stop = True
                if trainer.is_global_zero:
                    show(trainer, f"bnguard: stopping the trainer because of {group.worst.code}")

    @guarded
    def _present(self, trainer: Trainer, by_rank: Sequence[Report | None]) -> None:
        report = merge_reports(by_rank, self._rules)
        if report is None:
            return
        self.report = report
        if not trainer.is_global_zero or is_rehearsal(trainer):
            return
        folder = log_folder(trainer)
        if self._is_printed:
            rich.print(report)
            for command in _commands(trainer, report):
                print(command)
        if self._is_written and folder is not None:
            write_document(report, folder / REPORT_FILE)

    def _greeting(self, trainer: Trainer) -> str:
        folder = log_folder(trainer) if self._is_written else None
        where = "" if folder is None else f", and in {folder / REPORT_FILE}"
        ranks = number_of_ranks()
        who = "" if ranks == 1 else f" on each of {ranks} ranks"
        return (
            f"bnguard · watching {len(self._momenta)} BN layers{who} · findings appear here, "
            f"the report at the end{where}"
        )


def _commands(trainer: Trainer, report: Report) -> Iterator[str]:
    """Yield the commands to type for the checkpoint just saved."""
    path = newest_checkpoint(trainer) if is_fitting(trainer) else None
    if path is None or not report.findings:
        return
    yield f"The checkpoint saved: bnguard inspect {shlex.quote(path)}"
    if any(finding.fix.repair == "recalibrate" for finding in report.findings):
        yield (
            f"Its repair: bnguard recalibrate {shlex.quote(path)} "
            f"--model {class_path(trainer.lightning_module)} "
            f"--data {class_path(datamodule_of(trainer))}"
        )
