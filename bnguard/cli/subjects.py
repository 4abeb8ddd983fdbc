"""The model and the data that a command line names, as LightningCLI names them.

``--model pkg.LitModel --model.width 64 --data pkg.DataModule``, a function in place of a class,
or ``--config config.yaml`` as LightningCLI saves it. Only what the user names is imported, never a
path that a checkpoint holds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace
from torch import nn
from torch.utils.data import DataLoader

from bnguard.errors import ConfigurationError

_OPTIONS = ("model", "data")


@dataclass(frozen=True)
class Subject:
    """What a command line says of a model or of data.

    Attributes:
        option: ``"model"`` or ``"data"``.
        build: The class or function that was named.
        arguments: Arguments that a configuration file gives it.
    """

    option: str
    build: Callable[..., object]
    arguments: Mapping[str, Any]

    @property
    def path(self) -> str:
        """Where it is imported from."""
        return f"{self.build.__module__}.{getattr(self.build, '__qualname__', self.build)}"

    def add_arguments(self, parser: ArgumentParser, defaults: Mapping[str, Any]) -> None:
        """Add the arguments of the class or function as ``--model.NAME``.

        Args:
            parser: The parser to add them to.
            defaults: Values to start from, hyper-parameters of a checkpoint perhaps; those that
                it does not take are left out, and the configuration file overrides them.
        """
        if isinstance(self.build, type):
            parser.add_class_arguments(self.build, self.option, fail_untyped=False)
        else:
            parser.add_function_arguments(self.build, self.option, fail_untyped=False)
        known = parser.get_defaults().get(self.option) or {}
        for name, value in {**defaults, **self.arguments}.items():
            if name in known:
                parser.set_defaults({f"{self.option}.{name}": value})
            elif name in self.arguments:
                raise ConfigurationError(f"--config gives {self.option} {name!r}, not an argument")

    def built(self, parser: ArgumentParser, values: Namespace) -> object:
        """Return what the class or function makes of the arguments parsed.

        Raises:
            ConfigurationError: It raised an exception.
        """
        try:
            # Instantiated one by one, so that an error is told of what raised it.
            arguments = values.get(self.option) or Namespace()  # type: ignore[no-untyped-call]
            given = Namespace({self.option: arguments})  # type: ignore[no-untyped-call]
            made = parser.instantiate(given)[self.option]
            return made if isinstance(self.build, type) else self.build(**vars(made))
        except Exception as error:
            raise ConfigurationError(
                f"--{self.option} {self.path} failed with {type(error).__name__}: {error}"
            ) from error


def named_subjects(arguments: list[str]) -> tuple[dict[str, Subject], list[str]]:
    """Return the model and the data that the arguments name, and the arguments that are left.

    Raises:
        ConfigurationError: What is named cannot be imported, or the configuration not be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in (*_OPTIONS, "config"):
        parser.add_argument(f"--{option}")
    try:
        values, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigurationError(str(error)) from error
    configuration = {} if values.config is None else _configuration(Path(values.config))
    subjects = {}
    for option in _OPTIONS:
        path, init = _path_and_arguments(configuration.get(option), getattr(values, option))
        if path is not None:
            subjects[option] = Subject(option, _imported(path, option), init)
    return subjects, rest


def built_model(subject: Subject, parser: ArgumentParser, values: Namespace) -> nn.Module:
    """Return the model that was named.

    Raises:
        ConfigurationError: It cannot be built, or is no ``torch.nn.Module``.
    """
    model = subject.built(parser, values)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"--model {subject.path} gives a {type(model).__name__}, no torch.nn.Module"
        )
    return model


@dataclass(frozen=True)
class Data:
    """Data that was named: a data module, or a loader as a function gives it.

    Attributes:
        path: Where it was imported from.
        source: The data module or loader.
    """

    path: str
    source: object

    @property
    def is_module(self) -> bool:
        """Whether it is a data module, and not a bare loader, whose batches may have no labels."""
        return any(self.has(split) for split in ("train", "val", "test"))

    def has(self, split: str) -> bool:
        """Return whether there is a loader of this split."""
        return hasattr(self.source, f"{split}_dataloader")

    def loader(self, split: str) -> Iterable[object]:
        """Return the loader of a split; a bare loader serves as any of them.

        Raises:
            ConfigurationError: There is none, or it cannot be made.
        """
        name = f"{split}_dataloader"
        if not self.has(split):
            if isinstance(self.source, Iterable):
                return self.source
            raise ConfigurationError(f"--data {self.path} has no {name}() and cannot be iterated")
        try:
            self.source.prepare_data()  # type: ignore[attr-defined]
            self.source.setup("test" if split == "test" else "fit")  # type: ignore[attr-defined]
            loader: object = getattr(self.source, name)()
        except ConfigurationError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"--data {self.path} failed in {name}() with {type(error).__name__}: {error}"
            ) from error
        if isinstance(loader, (list, tuple)) and loader and isinstance(loader[0], DataLoader):
            loader = loader[0]
        if not isinstance(loader, Iterable):
            raise ConfigurationError(f"--data {self.path} gives no {name}")
        return loader


def built_data(subject: Subject, parser: ArgumentParser, values: Namespace) -> Data:
    """Return the data that were named.

    Raises:
        ConfigurationError: They cannot be built.
    """
    return Data(subject.path, subject.built(parser, values))


def configuration_beside(checkpoint: Path) -> Path | None:
    """Return the configuration that LightningCLI saved with a checkpoint; None where there is none.

    A run's folder holds ``config.yaml``, and its checkpoints a folder further down.
    """
    folders = (checkpoint.parent, checkpoint.parent.parent)
    return next((path for folder in folders if (path := folder / "config.yaml").is_file()), None)


def _configuration(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigurationError(f"--config {path} cannot be read: {reason}") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"--config {path} holds no mapping with 'model' and 'data'")
    return content


def _path_and_arguments(
    configured: object, named: str | None
) -> tuple[str | None, Mapping[str, Any]]:
    """Return the path of the class, and its arguments where the configuration is for that class."""
    section = configured if isinstance(configured, dict) else {}
    path = section.get("class_path")
    arguments = section.get("init_args", {}) if path is not None else section
    if named is not None and path not in (None, named):
        arguments = {}
    return named or path, arguments or {}


def _imported(path: str, option: str) -> Callable[..., object]:
    """Return what ``package.module.Class``, or ``package.module:function``, names."""
    module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name:
        raise ConfigurationError(f"--{option} {path}: give it as package.module.Name")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: object = getattr(importlib.import_module(module_name), name)
    except Exception as error:
        raise ConfigurationError(
            f"--{option} {path} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigurationError(f"--{option} {path} is neither a class nor a function")
    return found
