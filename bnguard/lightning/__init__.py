"""Callbacks for a Lightning ``Trainer``: thin adapters over monitor and fixes.

They serve ``pytorch_lightning`` and ``lightning.pytorch`` alike.
"""

from __future__ import annotations

from bnguard.lightning.monitor import REPORT_FILE, BatchNormMonitor
from bnguard.lightning.recalibration import BatchNormRecalibration

__all__ = ["REPORT_FILE", "BatchNormMonitor", "BatchNormRecalibration"]
