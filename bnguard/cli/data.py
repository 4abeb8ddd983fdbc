"""The data that a command line names: a data module, a loader, or those of the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from bnguard.cli.model_and_data import Subject
from bnguard.cli.output import failing_as
from bnguard.errors import ConfigurationError

if TYPE_CHECKING:
    from torch import nn

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Data:
    """Data that was named: a data module, or a loader as a function gives it.

    Attributes:
        path: Where it was imported from.
        source: The data module or loader.
    """

    path: str
    source: object
    _stages: set[str] = field(default_factory=set, init=False, repr=False)

    @property
    def is_module(self) -> bool:
        """Whether it is a data module, and not a bare loader, whose batches may have no labels."""
        return any(self.has(split) for split in _SPLITS)

    def has(self, split: str) -> bool:
        """Return whether there is a loader of this split."""
        return _has_loader(self.source, split)

    def loader(self, split: str) -> Iterable[object]:
        """Return the loader of a split; a bare loader serves as any of them.

        Raises:
            ConfigurationError: There is none, or it cannot be made.
        """
        from torch.utils.data import DataLoader

        name = f"{split}_dataloader"
        if not self.has(split):
            if not self.is_module and isinstance(self.source, Iterable):
                return self.source
            its = [known for known in _SPLITS if self.has(known)]
            other = f"use --split {its[0]}" if its else "give a data module, or a loader"
            raise ConfigurationError(f"--data {self.path} has no {name}(): {other}")
        with failing_as(f"--data {self.path}: {name}()"):
            self._set_up("test" if split == "test" else "fit")
            loader: object = getattr(self.source, name)()
        if isinstance(loader, Mapping):
            loader = list(loader.values())
        if isinstance(loader, (list, tuple)) and loader and isinstance(loader[0], DataLoader):
            loader = loader[0]
        if not isinstance(loader, Iterable):
            raise ConfigurationError(f"--data {self.path} gives no {name}")
        return loader

    def _set_up(self, stage: str) -> None:
        """Prepare the data, once for each stage: a split at random must not be another later."""
        if stage in self._stages:
            return
        source: Any = self.source
        if not self._stages:
            source.prepare_data()
        self._stages.add(stage)
        source.setup(stage)


def built_data(subject: Subject, values: Namespace) -> Data:
    """Return the data that were named.

    Raises:
        ConfigurationError: They cannot be built.
    """
    return Data(subject.path, subject.built(values))


def data_of_model(model: nn.Module, path: str) -> Data:
    """Return the loaders that a Lightning module has itself."""
    return Data(path, model)


def has_loaders(build: Callable[..., object]) -> bool:
    """Return whether a class has loaders of its own, as a Lightning module may."""
    return isinstance(build, type) and any(_has_loader(build, split) for split in _SPLITS)


def _has_loader(source: object, split: str) -> bool:
    method = getattr(source, f"{split}_dataloader", None)
    # Lightning's own only raise.
    return method is not None and not method.__qualname__.startswith("DataHooks.")
