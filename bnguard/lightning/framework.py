"""Lightning, under whichever of its two names it is there: both are served by one class.

Which package the base class comes from makes no difference to a Trainer of the other.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

_NAMES = ("pytorch_lightning", "lightning.pytorch")


def _package() -> ModuleType:
    """Return the package that is imported already, else the first that is installed."""
    by_use = sorted(_NAMES, key=lambda name: name not in sys.modules)
    for name in by_use:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ModuleNotFoundError(
        "bnguard.lightning needs one of two packages: pip install lightning, or pytorch-lightning"
    )


if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningModule, Trainer
    from pytorch_lightning.utilities import CombinedLoader
    from pytorch_lightning.utilities.seed import isolate_rng
else:
    package = _package()
    Callback, LightningModule = package.Callback, package.LightningModule
    Trainer = package.Trainer
    CombinedLoader = importlib.import_module(f"{package.__name__}.utilities").CombinedLoader
    isolate_rng = importlib.import_module(f"{package.__name__}.utilities.seed").isolate_rng

__all__ = ["Callback", "CombinedLoader", "LightningModule", "Trainer", "isolate_rng"]
