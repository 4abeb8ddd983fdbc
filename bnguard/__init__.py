"""bnguard tells what is wrong with the batch normalisation of a PyTorch network, and repairs it.

The public names are resolved when they are first used (PEP 562): importing bnguard alone imports
not even torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from bnguard.version import __version__

if TYPE_CHECKING:
    from bnguard.adapters import register_layer
    from bnguard.errors import (
        BNGuardError,
        CalibrationError,
        CheckpointError,
        ConfigurationError,
    )
    from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
    from bnguard.fixes.recalibrate import recalibrate
    from bnguard.fixes.recalibration import Recalibration
    from bnguard.inspection import inspect
    from bnguard.monitor import Monitor, watch
    from bnguard.report import Report
    from bnguard.rules import RULES, Rule
    from bnguard.swapping.api import swap
    from bnguard.swapping.result import Swap
    from bnguard.whatif.diagnose import diagnose
    from bnguard.whatif.diagnosis import Diagnosis

_HOMES = {
    "RULES": "bnguard.rules",
    "BNGuardError": "bnguard.errors",
    "CalibrationError": "bnguard.errors",
    "CheckpointError": "bnguard.errors",
    "ConfigurationError": "bnguard.errors",
    "Diagnosis": "bnguard.whatif.diagnosis",
    "Evidence": "bnguard.findings",
    "Finding": "bnguard.findings",
    "Fix": "bnguard.findings",
    "Monitor": "bnguard.monitor",
    "Recalibration": "bnguard.fixes.recalibration",
    "Report": "bnguard.report",
    "Rule": "bnguard.rules",
    "Severity": "bnguard.findings",
    "Skipped": "bnguard.findings",
    "Swap": "bnguard.swapping.result",
    "diagnose": "bnguard.whatif.diagnose",
    "inspect": "bnguard.inspection",
    "recalibrate": "bnguard.fixes.recalibrate",
    "register_layer": "bnguard.adapters",
    "swap": "bnguard.swapping.api",
    "watch": "bnguard.monitor",
}

__all__ = [
    "RULES",
    "BNGuardError",
    "CalibrationError",
    "CheckpointError",
    "ConfigurationError",
    "Diagnosis",
    "Evidence",
    "Finding",
    "Fix",
    "Monitor",
    "Recalibration",
    "Report",
    "Rule",
    "Severity",
    "Skipped",
    "Swap",
    "__version__",
    "diagnose",
    "inspect",
    "recalibrate",
    "register_layer",
    "swap",
    "watch",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'bnguard' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
