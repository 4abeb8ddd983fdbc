"""Reporters of a run's results, behind one protocol: a file for each service, and one for text.

A new service is a file like ``wandb.py``; ``trainer_loggers.py`` gives its reporter to the trainers
that have its logger.
"""

from bnguard.loggers.mlflow import MLflow
from bnguard.loggers.reporter import Reporter, RunLog
from bnguard.loggers.scalars import Scalars
from bnguard.loggers.tensorboard import TensorBoard
from bnguard.loggers.text import CSV, JSON, REPORT_FILE, Console
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
