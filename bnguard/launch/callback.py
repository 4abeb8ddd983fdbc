"""The callback that is added to each Trainer of a script."""

from __future__ import annotations

from pathlib import Path

from bnguard.lightning.framework import LightningModule, Trainer
from bnguard.lightning.monitor import BatchNormMonitor
from bnguard.lightning.trainer import log_folder
from bnguard.monitor import Monitor
from bnguard.report import Report

# The callbacks that watch: those added, or the user's own in their place.
watching: list[BatchNormMonitor] = []


class AddedMonitor(BatchNormMonitor):
    """A :class:`BatchNormMonitor` that makes way for one that the user has added.

    Attributes:
        folder: The folder of the trainer's logger; None without one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer if it has another callback that watches."""
        callbacks: list[object] = trainer.callbacks  # type: ignore[attr-defined]
        others = [c for c in callbacks if isinstance(c, BatchNormMonitor) and c is not self]
        if others:
            # A new list: Lightning is iterating over this one.
            trainer.callbacks = [c for c in callbacks if c is not self]  # type: ignore[attr-defined]
        watching.extend(callback for callback in others or [self] if callback not in watching)
        super().setup(trainer, pl_module, stage)

    def _end(self, trainer: Trainer, monitor: Monitor, report: Report) -> None:
        self.folder = log_folder(trainer)
        super()._end(trainer, monitor, report)
