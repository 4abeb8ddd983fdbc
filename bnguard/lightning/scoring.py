"""How good a module is, by its own validation step on a few batches."""

from __future__ import annotations

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

from torch import Tensor, nn

from bnguard.errors import ConfigurationError, in_one_line, user_code
from bnguard.lightning.framework import LightningModule, Trainer


class ValidationScore:
    """Scores a module by what its ``validation_step`` logs or returns; the higher, the better.

    A copy of the module runs the step, in eval mode, and what it logs is caught: metrics, lists
    and loggers of the run are not touched by it. Counted is what a checkpoint callback or early
    stopping monitors, where the step logs that; else the loss that it returns; else the first
    thing logged with "loss" in its name. Losses count negative.

    Args:
        trainer: The trainer.
        batches: The batches to score on, as the step takes them; no more of them than the trainer
            validates on, since a step may look something up by the number of its batch.

    Raises:
        ConfigurationError: There is no batch.
        UserCodeError: The loader raised an exception, or later the step.

    Attributes:
        name: What was counted, after the first call.
        sign: 1 where more of it is better, else -1.
    """

    def __init__(self, trainer: Trainer, batches: Iterable[object]) -> None:
        self.name = ""
        self.sign = -1.0
        self._trainer = trainer
        with user_code("validation loader"):
            self._batches = tuple(batches)
        if not self._batches:
            raise ConfigurationError(
                "the trainer validates on no batch, so nothing says whether new statistics are "
                "better: pass score=, or keep='always'"
            )

    def __call__(self, module: nn.Module) -> float:
        """Return the score of a module."""
        twin = twin_of(module, self._trainer).eval()
        logged: dict[str, list[object]] = defaultdict(list)
        returned: list[object] = []
        metrics: list[Any] = [part for part in twin.modules() if _is_metric(part)]
        for metric in metrics:
            metric.reset()

        def log(name: str, value: object, *_: object, **__: object) -> None:
            logged[name].append(value)

        twin.log = log  # type: ignore[method-assign]
        step: Callable[..., Any] = twin.validation_step
        parameters = inspect.signature(step).parameters
        for index, batch in enumerate(self._batches):
            # As Lightning calls it: a step may do without the number.
            numbers = (index,) if len(parameters) > 1 or "batch_idx" in parameters else ()
            extra = (0,) if "dataloader_idx" in parameters else ()
            with user_code("validation_step"), self._trainer.precision_plugin.val_step_context():
                output = step(batch, *numbers, *extra)
            returned.append(output.get("loss") if isinstance(output, dict) else output)
        counted = self._counted(logged, returned)
        return self.sign * _number(counted)

    def _counted(
        self, logged: dict[str, list[object]], returned: Sequence[object]
    ) -> Sequence[object]:
        for callback in self._trainer.callbacks:  # type: ignore[attr-defined]
            monitored = getattr(callback, "monitor", None)
            if monitored in logged:
                self.name = monitored
                self.sign = 1.0 if getattr(callback, "mode", "min") == "max" else -1.0
                return logged[monitored]
        if returned and all(isinstance(loss, Tensor) and loss.numel() == 1 for loss in returned):
            self.name = "the loss returned"
            return returned
        for name, values in logged.items():
            if "loss" in name:
                self.name = name
                return values
        raise ConfigurationError(
            "validation_step neither returns a loss nor logs one, so nothing says whether new "
            "statistics are better: pass score=, or keep='always'"
        )


def twin_of(module: nn.Module, trainer: Trainer) -> LightningModule:
    """Return a copy of a module that has the same trainer.

    Raises:
        ConfigurationError: It cannot be copied.
    """
    try:
        twin: LightningModule = copy.deepcopy(module)  # type: ignore[assignment]
    except Exception as error:
        raise ConfigurationError(
            f"{type(module).__name__} cannot be copied ({in_one_line(error)}): pass score=, or "
            "keep='always', and when= other than 'checkpoint'"
        ) from error
    twin.trainer = trainer
    return twin


def _number(values: Sequence[object]) -> float:
    """Return the mean over the batches; a metric object has its own."""
    last: Any = values[-1]
    if _is_metric(last):
        return float(last.compute())
    return fmean(float(value) for value in values)  # type: ignore[arg-type]


def _is_metric(candidate: object) -> bool:
    return hasattr(candidate, "compute") and hasattr(candidate, "reset")
