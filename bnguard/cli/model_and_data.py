"""The classes and functions that a command line names, as LightningCLI names model and data.

``--model pkg.LitModel --model.width 64 --data pkg.DataModule``, a function in place of a class,
or ``--config config.yaml`` as LightningCLI saves it. Only what the user names is imported, never a
path that a checkpoint holds.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from bnguard.checkpoint.model import ForeignValue
from bnguard.cli.hyperparameters import (
    annotations_of,
    arguments_by_value,
    as_argument,
    harmless_defaults,
)
from bnguard.cli.output import failing_as
from bnguard.errors import ConfigurationError, nearest_name

if TYPE_CHECKING:
    from torch import nn

OPTIONS = ("model", "data")


@dataclass(frozen=True)
class Configuration:
    """A configuration file as LightningCLI saves it.

    Attributes:
        path: The file.
        sections: What it says, by ``"model"`` and ``"data"``.
        is_named: Whether the user named it; what was found beside a checkpoint may be somebody
            else's, and is passed over where it does not fit.
    """

    path: Path
    sections: Mapping[str, object]
    is_named: bool

    def section(self, option: str) -> tuple[str | None, Mapping[str, Any]]:
        """Return the class that it gives for the model or the data, and its arguments.

        The class is None where LightningCLI was given fixed classes: it saves arguments alone.
        """
        section = self.sections.get(option)
        if not isinstance(section, dict):
            return None, {}
        path = section.get("class_path")
        arguments = section if path is None else section.get("init_args")
        return path, arguments if isinstance(arguments, dict) else {}


@dataclass(frozen=True)
class Subject:
    """What a command line says of a model or of data.

    Attributes:
        option: ``"model"`` or ``"data"``.
        build: The class or function that was named.
        configuration: The configuration file that gives it arguments; None where none does.
        stored: Arguments that a checkpoint holds, by name, to start from.
    """

    option: str
    build: Callable[..., object]
    configuration: Configuration | None = None
    stored: Mapping[str, object] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where it is imported from."""
        return f"{self.build.__module__}.{getattr(self.build, '__qualname__', self.build)}"

    def starting_from(self, stored: Mapping[str, object], whole: str | None) -> Subject:
        """Return the subject with the hyper-parameters of a checkpoint to start from.

        Args:
            stored: The hyper-parameters by name.
            whole: The argument that was given all of them; None where each was one.
        """
        if whole in annotations_of(self.build):
            plain = {n: v for n, v in stored.items() if not isinstance(v, ForeignValue)}
            others = {f"{whole}.{n}": v for n, v in stored.items() if n not in plain}
            stored = {whole: plain, **others} if stored else {}
        return replace(self, stored=stored)

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the arguments of the class or function as ``--model.NAME``.

        They start from the hyper-parameters stored; those that it does not take, or that name
        what would be imported, are left out, and the configuration file overrides them.

        Raises:
            ConfigurationError: The configuration file gives what it does not take.
        """
        self._declare(parser)
        known = parser.get_defaults().get(self.option) or {}
        configured = self._configured(known)
        stored = {name: value for name, value in self.stored.items() if name not in configured}
        with failing_as(f"the arguments that are stored for --{self.option} {self.path}"):
            parser.set_defaults(harmless_defaults(parser, self.option, stored))
            parser.get_defaults()
        with failing_as(f"the configuration of --{self.option} {self.path}"):
            parser.set_defaults({f"{self.option}.{name}": v for name, v in configured.items()})
            parser.get_defaults()

    def left_out(self, parser: ArgumentParser) -> list[str]:
        """Return the arguments that were stored and cannot be used, and that nothing else gives."""
        taken = harmless_defaults(parser, self.option, self.stored)
        known = parser.get_defaults().get(self.option) or {}
        configured = self._configured(known)
        prefixes = [
            f"{self.option}.{name}" for name in self.stored if name.partition(".")[0] in known
        ]
        return [
            prefix
            for prefix in prefixes
            if prefix.partition(".")[2] not in configured
            and not any(name == prefix or name.startswith(f"{prefix}.") for name in taken)
        ]

    def _declare(self, parser: ArgumentParser) -> None:
        """Add the arguments by their types, and those without one by what was stored for them."""
        alone = ArgumentParser(exit_on_error=False)
        self._add(alone, set())
        known = vars(alone.get_defaults().get(self.option) or Namespace())  # type: ignore[no-untyped-call]
        by_value = arguments_by_value(self.build, self.stored, known)
        self._add(parser, set(by_value))
        for name, kind in by_value.items():
            parser.add_argument(f"--{self.option}.{name}", type=kind)

    def _add(self, parser: ArgumentParser, skip: set[str | int]) -> None:
        if isinstance(self.build, type):
            parser.add_class_arguments(
                self.build, self.option, fail_untyped=False, skip=skip, instantiate=False
            )
        else:
            parser.add_function_arguments(self.build, self.option, fail_untyped=False, skip=skip)

    def _configured(self, known: Container[str]) -> Mapping[str, Any]:
        if self.configuration is None:
            return {}
        _, arguments = self.configuration.section(self.option)
        unknown = next((name for name in arguments if name not in known), None)
        if unknown is None:
            return arguments
        if self.configuration.is_named:
            raise ConfigurationError(
                f"{self.configuration.path} gives the {self.option} {unknown!r}, which "
                f"{self.path} does not take: name the --{self.option} that it is for"
            )
        return {}

    def built(self, values: Namespace) -> object:
        """Return what the class or function makes of the arguments parsed.

        Raises:
            ConfigurationError: It raised an exception.
        """
        parser = ArgumentParser(exit_on_error=False)
        self._declare(parser)
        with failing_as(f"--{self.option} {self.path}"):
            arguments = values.get(self.option) or Namespace()  # type: ignore[no-untyped-call]
            given = Namespace({self.option: arguments})  # type: ignore[no-untyped-call]
            made = parser.instantiate(given)[self.option]
            return self.build(**self.arguments(made))

    def arguments(self, values: Namespace) -> dict[str, object]:
        """Return values by the names of the arguments, each mapping as what its argument takes."""
        hints = annotations_of(self.build)
        return {name: as_argument(value, hints.get(name)) for name, value in vars(values).items()}


def named_subjects(
    arguments: list[str],
    found: Configuration | None = None,
    options: Iterable[str] = OPTIONS,
) -> tuple[dict[str, Subject], list[str]]:
    """Return the model and the data that the arguments name, and the arguments that are left.

    Args:
        arguments: The arguments of a command.
        found: The configuration to use where the arguments name none.
        options: What there is to name.

    Raises:
        ConfigurationError: What is named cannot be imported, or the configuration not be read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in (*options, "config"):
        parser.add_argument(f"--{option}")
    try:
        values, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigurationError(str(error)) from error
    configuration = found if values.config is None else _read_configuration(Path(values.config))
    subjects = {}
    for option in options:
        subject = _subject(option, getattr(values, option), configuration)
        if subject is not None:
            subjects[option] = subject
    return subjects, rest


def _subject(option: str, named: str | None, configuration: Configuration | None) -> Subject | None:
    configured = None if configuration is None else configuration.section(option)[0]
    path = named or configured
    if path is None:
        return None
    if named is None and path.startswith("__main__."):
        assert configuration is not None
        raise ConfigurationError(
            f"{configuration.path} names {path}, a class of the script that was run: "
            f"name it as --{option} script.{path.removeprefix('__main__.')}"
        )
    is_for_it = configured in (None, path) or _is_of_script(configured, path)
    return Subject(option, _imported(path, option), configuration if is_for_it else None)


def _is_of_script(configured: str | None, named: str) -> bool:
    """Whether a class of the script that was run may be the one that is named."""
    name = named.replace(":", ".").rpartition(".")[2]
    return configured == f"__main__.{name}"


def built_model(subject: Subject, values: Namespace) -> nn.Module:
    """Return the model that was named.

    Raises:
        ConfigurationError: It cannot be built, or is no ``torch.nn.Module``.
    """
    from torch import nn

    model = subject.built(values)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(
            f"--model {subject.path} gives a {type(model).__name__}, no torch.nn.Module"
        )
    # Where Lightning has large models make their layers.
    configure = getattr(model, "configure_model", None)
    if configure is not None and not configure.__qualname__.startswith("ModelHooks."):
        with failing_as(f"--model {subject.path}: configure_model()"):
            configure()
    return model


def configuration_beside(checkpoint: Path) -> Configuration | None:
    """Return the configuration that LightningCLI saved with a checkpoint; None where there is none.

    A run's folder holds ``config.yaml``, and its checkpoints a folder further down.
    """
    folder = checkpoint.absolute().parent
    for path in (folder / "config.yaml", folder.parent / "config.yaml"):
        try:
            configuration = _read_configuration(path, is_named=False)
        except ConfigurationError:
            continue
        if any(isinstance(configuration.sections.get(option), dict) for option in OPTIONS):
            return configuration
    return None


def _read_configuration(path: Path, *, is_named: bool = True) -> Configuration:
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigurationError(f"--config {path} cannot be read: {reason}") from error
    # One that was written for all subcommands has a section for each.
    if isinstance(content, dict) and "model" not in content:
        content = content.get("fit", content)
    if not isinstance(content, dict):
        raise ConfigurationError(f"--config {path} holds no mapping with 'model' and 'data'")
    return Configuration(path, content, is_named)


def _module_of_file(file: Path, what: str) -> tuple[Path, str]:
    """Return the folder from which a file is imported, and the name of its module there.

    Raises:
        ConfigurationError: There is no such file, or a module of its name was imported before.
    """
    file = file.absolute()
    if not file.is_file():
        raise ConfigurationError(f"{what}: there is no file {file}")
    folder, name = file.parent, file.stem
    while (folder / "__init__.py").is_file():
        folder, name = folder.parent, f"{folder.name}.{name}"
    loaded = getattr(sys.modules.get(name), "__file__", str(file))
    if name in sys.modules and Path(loaded or "").resolve() != file.resolve():
        raise ConfigurationError(f"{what}: a module named {name!r} exists; rename the file")
    return folder, name


def _imported(path: str, option: str) -> Callable[..., object]:
    """Return what ``package.module.Name``, ``package.module:name`` or ``file.py:Name`` means."""
    file, _, name = path.rpartition(":")
    folder = Path()
    if file.endswith(".py"):
        folder, module_name = _module_of_file(Path(file), f"--{option} {path}")
    else:
        module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name:
        raise ConfigurationError(
            f"--{option} {path}: give it as package.module.Name, or file.py:Name"
        )
    searched = "" if folder == Path() else str(folder)
    if searched not in sys.path:
        sys.path.insert(0, searched)
    try:
        with failing_as(f"--{option} {path}: the import"):
            module = importlib.import_module(module_name)
    except ConfigurationError as error:
        missing = getattr(error.__cause__, "name", None)
        if not isinstance(error.__cause__, ModuleNotFoundError) or not missing:
            raise
        if not f"{module_name}.".startswith(f"{missing}."):
            raise
        raise ConfigurationError(
            f"--{option} {path}: No module named {missing!r} in {folder.absolute()} or installed: "
            "go to the project's folder, or add that to PYTHONPATH"
        ) from error
    found: object = getattr(module, name, None)
    if found is None:
        own = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        near = nearest_name(name, own)
        hint = f"did you mean {near!r}?" if near else f"it has {', '.join(own) or 'none'}"
        raise ConfigurationError(
            f"--{option} {path}: {module_name} has no class or function {name!r}: {hint}"
        )
    if not callable(found):
        raise ConfigurationError(f"--{option} {path} is neither a class nor a function")
    return found
