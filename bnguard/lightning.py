"""Callbacks for a Lightning ``Trainer``: thin adapters over :mod:`bnguard.monitor`.

They serve ``pytorch_lightning`` and ``lightning.pytorch`` alike.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import rich

from bnguard.findings import FindingGroup
from bnguard.monitor import Monitor, one_line, watch
from bnguard.report import Report
from bnguard.report.document import write_document
from bnguard.report.markdown import findings_markdown
from bnguard.report.scalars import scalars
from bnguard.rules import RULES, Rule

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

if TYPE_CHECKING or "lightning.pytorch" not in sys.modules:
    from pytorch_lightning import Callback, LightningModule, Trainer
else:
    from lightning.pytorch import Callback, LightningModule, Trainer

REPORT_FILE = "bnguard-report.json"


class BatchNormMonitor(Callback):
    """Watches the BN layers during ``fit``, and says what is wrong with them.

    A finding is printed once, when it first appears; a few scalars go to every logger of the
    trainer at its logging steps, the findings as text to TensorBoard; the report is printed when
    ``fit`` ends, and written as ``bnguard-report.json`` into the directory of the logger.

    Args:
        every_n_steps: How often the rules run, in training batches.
        eval_batches: Validation batches that are read in each validation.
        rules: The rules to run.
        restore_poisoned: Put the last finite statistics back in the step that poisons them.

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
    ) -> None:
        super().__init__()
        self._every_n_steps = every_n_steps
        self._eval_batches = eval_batches
        self._rules = tuple(rules)
        self._restore_poisoned = restore_poisoned
        self._monitor: Monitor | None = None
        self._evaluation = ExitStack()
        self._last_text = ""
        self.report: Report | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch, with weights restored and moved, and after the sanity check."""

        def announce(group: FindingGroup) -> None:
            if trainer.is_global_zero:
                _print(trainer, f"bnguard: {group.worst.severity}: {one_line(group)}")

        self._monitor = watch(
            pl_module,
            optimizer=trainer.optimizers,
            every_n_steps=self._every_n_steps,
            eval_batches=self._eval_batches,
            planned_steps=_planned_batches(trainer),
            rules=self._rules,
            restore_poisoned=self._restore_poisoned,
            on_findings=announce,
        )

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
        self._monitor.step(trainer.global_step)
        if _is_logging_step(trainer):
            self._log(trainer, self._monitor)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to read what arrives in eval mode."""
        if self._monitor is not None and not trainer.sanity_checking:
            self._evaluation.enter_context(self._monitor.evaluation())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold what arrived in eval mode against the running statistics."""
        self._evaluation.close()
        if self._monitor is not None and not trainer.sanity_checking:
            self._log(trainer, self._monitor)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show and write the report."""
        self._conclude(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Show and write the report of a run that ends early, Ctrl-C included."""
        self._conclude(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the model as it was found."""
        self._evaluation.close()
        if self._monitor is not None:
            self._monitor.close()
            self._monitor = None

    def _conclude(self, trainer: Trainer) -> None:
        if self._monitor is None:
            return
        self._evaluation.close()
        self._log(trainer, self._monitor)
        self.report = self._monitor.report()
        folder = trainer.log_dir if trainer.loggers else None
        if trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            rich.print(self.report)
            if folder is not None and Path(folder).is_dir():
                write_document(self.report, Path(folder) / REPORT_FILE)
        self._monitor.close()
        self._monitor = None

    def _log(self, trainer: Trainer, monitor: Monitor) -> None:
        step = _logged_step(trainer)
        snapshot = monitor.snapshot()
        metrics = scalars(snapshot.history)
        text = findings_markdown(snapshot.groups)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)
            if text != self._last_text and _is_tensorboard(logger):
                writer: SummaryWriter = logger.experiment  # type: ignore[attr-defined]
                writer.add_text("bnguard/findings", text, step)
        self._last_text = text


def _print(trainer: Trainer, text: str) -> None:
    bar = trainer.progress_bar_callback
    if bar is not None and getattr(bar, "is_enabled", False):
        bar.print(text)
    else:
        print(text)


def _planned_batches(trainer: Trainer) -> int | None:
    """Return how many training batches are still to come; None where nobody can know."""
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if getattr(trainer, "fast_dev_run", False) or math.isinf(batches):
        return None
    by_epochs = math.inf
    if epochs is not None and epochs >= 0:
        by_epochs = max(0, epochs - trainer.current_epoch) * batches
    by_steps = math.inf
    if trainer.max_steps >= 0:
        remaining = max(0, trainer.max_steps - trainer.global_step)
        by_steps = remaining * trainer.accumulate_grad_batches
    planned = min(by_epochs, by_steps)
    return None if math.isinf(planned) else int(planned)


def _is_logging_step(trainer: Trainer) -> bool:
    every = getattr(trainer, "log_every_n_steps", 0)
    return bool(every) and (_logged_step(trainer) + 1) % every == 0


def _logged_step(trainer: Trainer) -> int:
    """Return the number under which ``self.log`` writes, which is private to Lightning."""
    loop = getattr(trainer.fit_loop, "epoch_loop", None)
    return int(getattr(loop, "_batches_that_stepped", trainer.global_step))


def _is_tensorboard(logger: object) -> bool:
    """Both packages and both writers have a class of this name, unrelated to each other."""
    return any(cls.__name__ == "TensorBoardLogger" for cls in type(logger).__mro__)
