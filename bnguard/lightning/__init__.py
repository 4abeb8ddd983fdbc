"""Callbacks for the ``Trainer`` of ``pytorch_lightning`` and ``lightning.pytorch``."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnguard.lightning.monitor import BatchNormMonitor
    from bnguard.lightning.recalibration import BatchNormRecalibration
    from bnguard.loggers import REPORT_FILE

__all__ = ["REPORT_FILE", "BatchNormMonitor", "BatchNormRecalibration"]

_HOMES = {
    "REPORT_FILE": "bnguard.loggers",
    "BatchNormMonitor": "bnguard.lightning.monitor",
    "BatchNormRecalibration": "bnguard.lightning.recalibration",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
