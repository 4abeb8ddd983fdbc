"""What a model is worth, by the validation metrics of its own Lightning module."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from bnguard.cli.devices import lightning_device
from bnguard.errors import ConfigurationError, nearest_name

# What the name of a metric says that is better when it is lower; rates of word and character
# errors only as words, since "answer" and "cancer" hold them too.
_LOWER_IS_BETTER = re.compile(
    r"loss|error|mae|mse|perplexity|(?<![a-z])[wc]er(?![a-z])", re.IGNORECASE
)
# Which of a module's metrics is meant where none is named, the first that fits.
_PREFERRED = ("acc", "f1", "dice", "iou", "auc", "map", "loss")

# What is said where there is no score.
NOT_SCORED = "not scored: that takes a validation_step, and validation data"


@dataclass
class Scorer:
    """Scores a Lightning module by the Trainer's own validation loop; the higher the better.

    Attributes:
        loader: What to validate on.
        device: Where.
        precision: In which precision, as the Trainer names it.
        metric: The metric that counts; chosen at the first validation where it is None.
    """

    loader: Iterable[object]
    device: torch.device
    precision: str
    metric: str | None = None

    def __call__(self, model: nn.Module) -> float:
        """Return the metric, with its sign turned where lower is better.

        Raises:
            ConfigurationError: The module logs no such metric.
        """
        value = self.metrics(model)[self.metric or ""]
        return -value if self.is_turned else value

    @property
    def is_turned(self) -> bool:
        """Whether the score is minus the metric."""
        return is_lower_better(self.metric or "")

    @property
    def meaning(self) -> str:
        """What the score is, in words."""
        metric = self.metric or ""
        return f"minus {metric}, which is better when lower" if self.is_turned else metric

    def metrics(self, model: nn.Module) -> Mapping[str, float]:
        """Return all metrics that a validation logs, and choose the one that counts."""
        from pytorch_lightning import Trainer

        accelerator, devices = lightning_device(self.device)
        with quiet_lightning():
            trainer = Trainer(
                accelerator=accelerator,
                devices=devices,
                precision=self.precision,  # type: ignore[arg-type]
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
            try:
                (metrics,) = trainer.validate(model, self.loader, verbose=False)  # type: ignore[arg-type]
            except Exception as error:
                raise ConfigurationError(
                    f"the model's validation fails on these data with {type(error).__name__}: "
                    f"{error}"
                ) from error
            finally:
                # The Trainer leaves it on the CPU, and tied to a validation that is over.
                model.to(self.device).trainer = None  # type: ignore[assignment]
        if self.metric is None:
            self.metric = _chosen(metrics)
        if self.metric not in metrics:
            near = nearest_name(self.metric, metrics)
            hint = f"did you mean {near!r}?" if near else f"it logs {', '.join(metrics) or 'none'}"
            raise ConfigurationError(f"validation logs no metric {self.metric!r}: {hint}")
        return metrics


def has_validation(model: nn.Module) -> bool:
    """Return whether a model is a Lightning module with a validation step of its own."""
    bases = [cls for cls in type(model).__mro__ if cls.__name__ == "LightningModule"]
    step = getattr(type(model), "validation_step", None)
    return bool(bases) and step is not getattr(bases[0], "validation_step", None)


def forward_of(model: nn.Module) -> Callable[[nn.Module, object], object] | None:
    """Return what calls a Lightning module without a forward of its own: its validation step.

    What it returns is then the output of the network inside, of the last part with parameters that
    the step calls. None for every other model, which is called itself.
    """
    has_forward = not type(model).forward.__qualname__.startswith("LightningModule.")
    if has_forward or not has_validation(model):
        return None
    return _validated


def _validated(module: nn.Module, batch: object) -> object:
    outputs: list[object] = []
    handles = [
        part.register_forward_hook(lambda part, args, output: outputs.append(output))
        for part in module.children()
        if any(True for _ in part.parameters())
    ]
    try:
        module.validation_step(batch, 0)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    return outputs[-1] if outputs else None


def is_lower_better(metric: str) -> bool:
    """Return whether a metric is better when it is lower, from the words in its name.

    >>> is_lower_better("val_loss"), is_lower_better("test/WER"), is_lower_better("cancer_recall")
    (True, True, False)
    """
    return _LOWER_IS_BETTER.search(metric) is not None


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Keep Lightning's remarks on workers and accelerators out of the output.

    To be entered after Lightning was imported, which sets the level of its logger.
    """
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="pytorch_lightning|lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _chosen(metrics: Mapping[str, float]) -> str:
    for word in _PREFERRED:
        for name in metrics:
            if word in name.lower():
                return name
    return next(iter(metrics), "")
