"""A callback for the ``Trainer`` of Hugging Face transformers, which many vision models train with.

transformers is imported here and nowhere else.
"""

from __future__ import annotations

import warnings
from contextlib import ExitStack
from typing import Any, ParamSpec

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bnguard.errors import Guard
from bnguard.findings import FindingGroup, notice, show
from bnguard.monitor import Monitor, watch
from bnguard.report import Report
from bnguard.report.terminal import as_terminal_text

_Arguments = ParamSpec("_Arguments")


class BatchNormCallback(TrainerCallback):
    """Watches the BN layers of a model that a Hugging Face ``Trainer`` trains.

    Findings are printed when they first appear, and the report when training ends. An error inside
    bnguard does not end the run: it is told as a warning, and the callback turns off.

    Args:
        every_n_steps: How often the rules run, in steps of the optimizer.

    Attributes:
        report: The report of the run that ended last; None before.
    """

    def __init__(self, *, every_n_steps: int = 50) -> None:
        self.report: Report | None = None
        self._every_n_steps = every_n_steps
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
        """Read what a batch left in the buffers whose gradients are accumulated."""
        self._guard(self._step, state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Read what the last batch left in the buffers."""
        self._guard(self._step, state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Read what arrives in eval mode, from the second batch on: the first has no event."""
        self._guard(self._evaluate)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Hold what arrived in eval mode against the running statistics."""
        self._guard(self._end_evaluation)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Print the report, and leave the model as it was found."""
        self._guard(self._conclude, state.is_world_process_zero)

    def _watch(
        self,
        model: nn.Module,
        optimizer: Any,
        loader: object,
        args: TrainingArguments,
        state: TrainerState,
    ) -> None:
        def tell(group: FindingGroup) -> None:
            if state.is_world_process_zero:
                show(notice(group))

        # A training that an exception ended has told nobody.
        self._let_go()
        self._monitor = watch(
            model,
            # accelerate wraps it.
            optimizer=getattr(optimizer, "optimizer", optimizer),
            every_n_steps=self._every_n_steps,
            planned_steps=state.max_steps * args.gradient_accumulation_steps,
            loader=loader,
            accumulated_batches=args.gradient_accumulation_steps,
            on_findings=tell,
            # The edge to the run is here.
            strict=True,
        )
        self._monitor._expect_calls()

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

    def _conclude(self, is_printed: bool) -> None:
        if self._monitor is None:
            return
        self._end_evaluation()
        self.report = self._monitor.report_of_all_ranks()
        if is_printed:
            show(as_terminal_text(self.report))
        self._let_go()

    def _let_go(self) -> None:
        monitor, self._monitor = self._monitor, None
        try:
            self._end_evaluation()
        finally:
            if monitor is not None:
                monitor._leave()
                monitor.close()
