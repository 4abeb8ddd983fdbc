"""Reporters of a run's results, a file each, behind one protocol."""

from bnguard.loggers.console import Console
from bnguard.loggers.csv import CSV
from bnguard.loggers.json import JSON, REPORT_FILE
from bnguard.loggers.mlflow import MLflow
from bnguard.loggers.reporter import Reporter
from bnguard.loggers.run_log import RunLog
from bnguard.loggers.scalars import Scalars
from bnguard.loggers.tensorboard import TensorBoard
from bnguard.loggers.wandb import WeightsAndBiases

__all__ = [
    "CSV",
    "JSON",
    "REPORT_FILE",
    "Console",
    "MLflow",
    "Reporter",
    "RunLog",
    "Scalars",
    "TensorBoard",
    "WeightsAndBiases",
]
