"""Lightning, under either of its two names.

The callbacks work in both Trainers; a Trainer takes only the modules of its own package.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any

_NAMES = ("pytorch_lightning", "lightning.pytorch")
# Before 2.6 a Trainer refuses callbacks of the other package. bnguard installs pytorch-lightning:
# what may be older is lightning, whether it is imported before or after bnguard.
_FOR_CALLBACKS = [name for name in _NAMES if sys.modules.get(name)][:1] or _NAMES[::-1]
_FABRIC_NAMES = {"pytorch_lightning": "lightning_fabric", "lightning.pytorch": "lightning.fabric"}


def _by_use(names: Iterable[str] = _NAMES) -> list[str]:
    return sorted(names, key=lambda name: name not in sys.modules)


def _package(names: Iterable[str]) -> ModuleType:
    """Return the first package that is installed."""
    for name in names:
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
    return _package(_by_use()) if name is None else importlib.import_module(name)


def fabric_of(module: object) -> Any:
    """Return the Fabric package of a module's Lightning package, else the installed one."""
    name = package_name_of(module)
    return _package(_by_use(_FABRIC_NAMES.values()) if name is None else [_FABRIC_NAMES[name]])


if TYPE_CHECKING:
    from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer
    from pytorch_lightning.utilities import CombinedLoader


def __getattr__(name: str) -> Any:
    """Import Lightning only when needed: perhaps only Fabric is installed."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = _package(_FOR_CALLBACKS if name == "Callback" else _by_use())
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
