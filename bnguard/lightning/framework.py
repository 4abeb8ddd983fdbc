"""Lightning, under whichever of its two names it is there.

The callbacks serve both, whichever their base class comes from. A Trainer does not: it takes the
modules of its own package alone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

_NAMES = ("pytorch_lightning", "lightning.pytorch")
_FABRIC_NAMES = {"pytorch_lightning": "lightning_fabric", "lightning.pytorch": "lightning.fabric"}


def _package(names: Iterable[str] = _NAMES) -> ModuleType:
    """Return the package that is imported already, else the first that is installed."""
    by_use = sorted(names, key=lambda name: name not in sys.modules)
    for name in by_use:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
    raise ModuleNotFoundError(
        "bnguard.lightning needs one of two packages: pip install lightning, or pytorch-lightning"
    )


def package_name_of(module: object) -> str | None:
    """Return the package that a Lightning module's base class comes from; None for other objects.

    >>> package_name_of(object())
    """
    for cls in type(module).__mro__:
        for name in _NAMES:
            if cls.__name__ == "LightningModule" and cls.__module__.startswith(f"{name}."):
                return name
    return None


def package_of(module: object) -> Any:
    """Return the package whose Trainer takes a Lightning module."""
    name = package_name_of(module)
    return _package() if name is None else importlib.import_module(name)


def fabric_of(module: object) -> Any:
    """Return the package of Fabric that belongs to a module's Lightning, or that is installed."""
    name = package_name_of(module)
    return _package(_FABRIC_NAMES.values() if name is None else [_FABRIC_NAMES[name]])


if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.utilities import CombinedLoader


def __getattr__(name: str) -> Any:
    """Import Lightning when something of it is needed: Fabric may be all that is installed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = _package()
    if name == "CombinedLoader":
        return importlib.import_module(f"{package.__name__}.utilities").CombinedLoader
    return getattr(package, name)


__all__ = [
    "Callback",
    "CombinedLoader",
    "LightningDataModule",
    "LightningModule",
    "Trainer",
]
