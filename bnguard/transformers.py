"""A callback for the ``Trainer`` of Hugging Face transformers, which many vision models train with.

transformers is imported here and nowhere else.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import default_logdir

from bnguard.errors import Guard
from bnguard.findings import FindingGroup
from bnguard.loggers import Console, Reporter, RunLog, Scalars
from bnguard.loggers.trainer_loggers import reporters_of_transformers
from bnguard.monitor import Monitor, watch
from bnguard.report import Report


class BatchNormCallback(TrainerCallback):
    """Watches the BN layers of a model that a Hugging Face ``Trainer`` trains.

    Findings are printed when they first appear, and the report when training ends. The integrations
    of ``report_to`` get the scalars and findings that the docstring of
    :class:`bnguard.lightning.BatchNormMonitor` lists; those of TensorBoard are in a run of their
    own, next to that of the ``Trainer``.

    An error inside bnguard does not end the run: it is shown as a warning, and the callback turns
    off.

    Args:
        every_n_steps: How often the rules run, in steps of the optimizer.
        scalars: ``"summary"`` for five scalars at most, ``"all"``, or ``"none"``.
        reporters: Further :class:`bnguard.loggers.Reporter` objects, for the main process.

    Attributes:
        report: The report of the last run that ended; None before.
    """

    def __init__(
        self,
        *,
        every_n_steps: int = 50,
        scalars: Scalars = "summary",
        reporters: Iterable[Reporter] = (),
    ) -> None:
        self.report: Report | None = None
        self._every_n_steps = every_n_steps
        self._scalars = scalars
        self._reporters = tuple(reporters)
        self._log = RunLog((), ())
        self._monitor: Monitor | None = None
        self._evaluation = ExitStack()
        self._is_evaluating = False
        self._guard = Guard(
            strict=False,
            let_go=self._let_go,
            tell=warnings.warn,
            consequence="it watches no longer, and the run goes on",
        )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Begin to watch."""
        self._guard.begin_anew()
        optimizer, loader = kwargs.get("optimizer"), kwargs.get("train_dataloader")
        self._guard(self._watch, kwargs["model"], optimizer, loader, args, state)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Read the buffers after a batch whose gradients are accumulated."""
        self._guard(self._step, state.global_step + 1)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Read the buffers after the last batch of a step; it is counted by now."""
        self._guard(self._step, state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Read the inputs in eval mode, from the second batch on: the first has no event."""
        self._guard(self._evaluate)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Compare the inputs in eval mode with the running statistics, and log."""
        self._guard(self._end_evaluation)
        self._guard(self._write, state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Log when the ``Trainer`` does; during an evaluation, not before it has ended."""
        self._guard(self._write, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Print the report, and leave the model as it was found."""
        self._guard(self._conclude, state.global_step)

    def _watch(
        self,
        model: nn.Module,
        optimizer: Any,
        loader: object,
        args: TrainingArguments,
        state: TrainerState,
    ) -> None:
        def announce(group: FindingGroup) -> None:
            self._log.announce([group], state.global_step)

        # A training that an exception ended did not get to its end event.
        self._let_go()
        self._monitor = watch(
            model,
            # accelerate wraps it.
            optimizer=getattr(optimizer, "optimizer", optimizer),
            every_n_steps=self._every_n_steps,
            planned_steps=state.max_steps,
            loader=loader,
            accumulated_batches=args.gradient_accumulation_steps,
            on_findings=announce,
            strict=True,  # The guard of the callback handles errors.
        )
        self._monitor._expect_calls()
        reporters: Sequence[Reporter] = ()
        if state.is_world_process_zero:
            folder = os.getenv("TENSORBOARD_LOGGING_DIR")
            if folder is None:
                folder = str(Path(str(args.output_dir), default_logdir()))
            chosen = reporters_of_transformers(
                args.report_to or (), Path(folder, "bnguard"), self._monitor.rules
            )
            reporters = (Console(), *chosen, *self._reporters)
        self._log = RunLog(reporters, self._monitor.rules, self._scalars)

    def _step(self, step: int) -> None:
        if self._monitor is not None:
            self._end_evaluation()
            self._monitor.step(step)

    def _evaluate(self) -> None:
        if self._monitor is not None and not self._is_evaluating:
            self._is_evaluating = True
            self._evaluation.enter_context(self._monitor.evaluation())

    def _end_evaluation(self) -> None:
        self._is_evaluating = False
        self._evaluation.close()

    def _write(self, step: int) -> None:
        if self._monitor is not None and not self._is_evaluating:
            self._log.write(self._monitor.check(), step)

    def _conclude(self, step: int) -> None:
        if self._monitor is None:
            return
        self._end_evaluation()
        self.report = self._monitor.report_of_all_ranks()
        self._let_go()
        self._log.conclude(self.report, step)

    def _let_go(self) -> None:
        monitor, self._monitor = self._monitor, None
        try:
            self._end_evaluation()
        finally:
            if monitor is not None:
                monitor._leave()
                monitor.close()
