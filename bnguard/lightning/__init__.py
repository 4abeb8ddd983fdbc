"""Callbacks for a Lightning ``Trainer``: thin adapters over monitor and fixes.

They serve ``pytorch_lightning`` and ``lightning.pytorch`` alike, and import neither until a
callback is asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnguard.lightning.monitor import BatchNormMonitor
    from bnguard.lightning.recalibration import BatchNormRecalibration
    from bnguard.report.json_document import REPORT_FILE

__all__ = ["REPORT_FILE", "BatchNormMonitor", "BatchNormRecalibration"]

_HOMES = {
    "REPORT_FILE": "bnguard.report.json_document",
    "BatchNormMonitor": "bnguard.lightning.monitor",
    "BatchNormRecalibration": "bnguard.lightning.recalibration",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
