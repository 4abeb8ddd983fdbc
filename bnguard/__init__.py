"""Find and repair faults of the batch normalisation in PyTorch networks.

The public names are resolved when they are first used (PEP 562): importing bnguard alone imports
not even torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnguard.errors import BNGuardError, CalibrationError, CheckpointError, ConfigurationError
    from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
    from bnguard.inspection import inspect
    from bnguard.layers.bn_layer import register_layer
    from bnguard.monitor import Monitor, watch
    from bnguard.recalibration.api import recalibrate
    from bnguard.recalibration.result import Recalibration
    from bnguard.report import Report
    from bnguard.rules import RULES, Rule
    from bnguard.swapping.api import swap
    from bnguard.swapping.result import Swap
    from bnguard.whatif.api import diagnose
    from bnguard.whatif.result import Diagnosis

__version__ = "0.2.0"

_HOMES = {
    "RULES": "bnguard.rules",
    "BNGuardError": "bnguard.errors",
    "CalibrationError": "bnguard.errors",
    "CheckpointError": "bnguard.errors",
    "ConfigurationError": "bnguard.errors",
    "Diagnosis": "bnguard.whatif.result",
    "Evidence": "bnguard.findings",
    "Finding": "bnguard.findings",
    "Fix": "bnguard.findings",
    "Monitor": "bnguard.monitor",
    "Recalibration": "bnguard.recalibration.result",
    "Report": "bnguard.report",
    "Rule": "bnguard.rules",
    "Severity": "bnguard.findings",
    "Skipped": "bnguard.findings",
    "Swap": "bnguard.swapping.result",
    "diagnose": "bnguard.whatif.api",
    "inspect": "bnguard.inspection",
    "recalibrate": "bnguard.recalibration.api",
    "register_layer": "bnguard.layers.bn_layer",
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
