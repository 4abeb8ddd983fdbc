"""Which reporters a run has: those of the loggers that its trainer has."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bnguard.loggers.mlflow import MLflow
from bnguard.loggers.reporter import Reporter, show_failure
from bnguard.loggers.tensorboard import TensorBoard
from bnguard.loggers.wandb import WeightsAndBiases
from bnguard.rules import Rule


class LightningLogger(Reporter):
    """Gives any logger of Lightning the scalars, which are all that every logger takes.

    Args:
        logger: The logger, a user's own perhaps.
    """

    def __init__(self, logger: Any) -> None:
        self._logger = logger

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Log the scalars as metrics."""
        self._logger.log_metrics(dict(scalars), step=step)


def reporters_of_lightning(
    loggers: Iterable[Any],
    rules: Sequence[Rule],
    subjects: str,
    checkpoint: Callable[[], str | None],
) -> Iterator[Reporter]:
    """Yield the reporter of each logger of a Lightning ``Trainer``, on rank zero.

    The logger classes of the two packages are unrelated, so their names distinguish them.

    Args:
        loggers: The loggers.
        rules: The rules in force.
        subjects: What names the model and its data in the commands that are proposed.
        checkpoint: Returns the path of the newest checkpoint, if one is saved.
    """
    for logger in loggers:
        try:
            yield _reporter_of(logger, rules, subjects, checkpoint)
        except Exception as error:
            show_failure(logger, error)


def _reporter_of(
    logger: Any, rules: Sequence[Rule], subjects: str, checkpoint: Callable[[], str | None]
) -> Reporter:
    kinds = {cls.__name__ for cls in type(logger).__mro__}
    if "TensorBoardLogger" in kinds:
        return TensorBoard(logger.experiment, rules, subjects, checkpoint)
    if "WandbLogger" in kinds:
        return WeightsAndBiases(logger.experiment, "trainer/global_step")
    if "MLFlowLogger" in kinds:
        return MLflow(logger.experiment, logger.run_id)
    return LightningLogger(logger)


def reporters_of_transformers(
    report_to: Iterable[str], folder: Path, rules: Sequence[Rule]
) -> Iterator[Reporter]:
    """Yield the reporter of each integration of a Hugging Face ``Trainer``, on rank zero.

    Args:
        report_to: Names of the integrations, whose own callbacks have begun their runs.
        folder: Where to create a log for TensorBoard: the integration keeps its writer to itself.
        rules: The rules in force.
    """
    for name in report_to:
        package = sys.modules.get(name)
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            yield TensorBoard(SummaryWriter(str(folder)), rules)
        elif name == "wandb" and package is not None and package.run is not None:
            yield WeightsAndBiases(package.run, "train/global_step")
        elif name == "mlflow" and package is not None and package.active_run() is not None:
            yield MLflow(package.MlflowClient(), package.active_run().info.run_id)
