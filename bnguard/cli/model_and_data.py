"""The classes and functions that a command line names, as LightningCLI names model and data.

``--model pkg.LitModel --model.width 64 --data pkg.DataModule``, a function in place of a class,
or ``--config config.yaml`` as LightningCLI saves it. Only what the user names is imported, never a
path that a checkpoint holds.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from jsonargparse import ArgumentParser, Namespace

from bnguard.cli.output import failing_as
from bnguard.errors import ConfigurationError, nearest_name

if TYPE_CHECKING:
    from torch import nn


# Hyper-parameters of a checkpoint as defaults of arguments, without importing what they name.


# What jsonargparse takes for the description of an object to import, in a dictionary or in YAML.
_DESCRIBES_OBJECT = "class_path"

# The classes of what jsonargparse has for an argument without a type, or with one that it cannot
# find: any value is taken as it is.
_UNTYPED = ("UntypedType", "UnvalidatedType")

# What an argument without a hint may be added as, so that a command line can change it.
_TYPES_BY_VALUE = (str, bool, int, float)

# Classes of namespaces: of argparse, of Lightning, of OmegaConf.
_SETTINGS = (argparse.Namespace.__name__, "AttributeDict", "DictConfig")

_ATOMS = (str, bool, int, float, complex, bytes, types.NoneType)
_CONTAINERS = (list, tuple, set, frozenset, dict)


def usable_defaults(
    parser: ArgumentParser, option: str, values: Mapping[str, object]
) -> tuple[dict[str, object], list[str]]:
    """Return those values that the arguments of a class take, and which lead to an import.

    Args:
        parser: The parser, to which the arguments were added as ``--OPTION.NAME``.
        option: ``"model"`` or ``"data"``.
        values: Values by the name of the argument.

    Returns:
        Values by the full name of the argument, and the names of those that cannot be used.
    """
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    usable, unusable = {}, []
    for name, value in _leaves(option, values, hints):
        if _is_harmless(value, hints[name]):
            usable[name] = value
        else:
            unusable.append(name)
    return usable, unusable


class Settings(dict[str, Any]):
    """A dictionary whose values are attributes too, as those of the namespace that was stored.

    >>> settings = Settings(lr=0.1)
    >>> settings.lr, settings["lr"], vars(settings)
    (0.1, 0.1, {'lr': 0.1})
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: object) -> None:
        self[name] = value

    @property
    def __dict__(self) -> dict[str, Any]:  # type: ignore[override]
        return dict(self)


def as_argument(value: object, hint: object) -> object:
    """Return a mapping as what an argument with this annotation takes.

    >>> as_argument({"lr": 0.1}, argparse.Namespace), as_argument({"lr": 0.1}, dict)
    (Namespace(lr=0.1), {'lr': 0.1})
    """
    if not isinstance(value, Mapping) or not _takes_settings(hint):
        return value
    if _last_name(hint) == argparse.Namespace.__name__:
        return argparse.Namespace(**value)
    return _as_settings(value)


def _as_settings(value: object) -> object:
    if isinstance(value, Mapping):
        return Settings({key: _as_settings(item) for key, item in value.items()})
    return [_as_settings(item) for item in value] if isinstance(value, list) else value


def arguments_by_value(
    build: Callable[..., object], values: Mapping[str, object], known: Mapping[str, object]
) -> dict[str, Any]:
    """Return the types of those arguments of which the stored values say what their hints do not.

    These are mappings for an argument without a type, or for a namespace; and, where ``**kwargs``
    leads to no names, all that was stored beyond the other arguments, as Lightning passes it.

    Args:
        build: The class or function.
        values: Values by the name of the argument.
        known: What the parser knows of the arguments of the class, by name.
    """
    named = annotations_of(build)
    takes_any = _has_keywords(build) and not known.keys() - named.keys()
    types_by_name: dict[str, Any] = {}
    for name, value in values.items():
        if not name.isidentifier() or name.startswith("_"):
            continue
        is_settings = isinstance(value, Mapping) and _takes_settings(named.get(name))
        if is_settings if name in named else takes_any:
            types_by_name[name] = _type_by_value(value)
    return types_by_name


def annotations_of(build: Callable[..., object]) -> dict[str, object]:
    """Return the annotations of the arguments of a class or function by name."""
    return {
        name: parameter.annotation
        for name, parameter in inspect.signature(build).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def _has_keywords(build: Callable[..., object]) -> bool:
    parameters = inspect.signature(build).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


def _takes_settings(hint: object) -> bool:
    """Whether an argument may take a namespace, by its annotation, which may be a text."""
    return hint is inspect.Parameter.empty or _last_name(hint) in _SETTINGS


def _last_name(hint: object) -> str:
    name = hint if isinstance(hint, str) else getattr(hint, "__name__", "")
    return name.rpartition(".")[2]


def _type_by_value(value: object) -> Any:
    if isinstance(value, Mapping):
        return dict[str, Any]  # so that one value in it can be given alone
    return type(value) if type(value) in _TYPES_BY_VALUE else Any


def _leaves(
    prefix: str, values: Mapping[str, object], hints: Mapping[str, Any]
) -> Iterator[tuple[str, object]]:
    """Yield the values by their full names; those of a data class, which is a group, one by one."""
    for key, value in values.items():
        name = f"{prefix}.{key}"
        is_group = any(known.startswith(f"{name}.") for known in hints)
        if is_group and isinstance(value, Mapping):
            yield from _leaves(name, value, hints)
        elif name in hints:
            yield name, value


def _is_harmless(value: object, hint: object) -> bool:
    texts = list(_texts(value))
    if any(_DESCRIBES_OBJECT in text for text in texts) or (texts and _imports(hint)):
        return False
    return hint in (str, str | None) or not any(map(_is_structure, texts))


def _is_structure(text: str) -> bool:
    """Whether YAML, as which jsonargparse reads a text, makes more of it than a text or a number.

    It could be the description of an object, and escapes hide the word that would tell.

    >>> _is_structure("resnet50"), _is_structure('{"a": 1}')
    (False, True)
    """
    try:
        return isinstance(yaml.safe_load(text), (dict, list, set, tuple))
    except yaml.YAMLError:
        return False  # and a text to jsonargparse as well
    except (RecursionError, ValueError):
        return True


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)


def _imports(hint: Any) -> bool:
    """Return whether a text given for an argument of this type may be imported.

    >>> _imports(str | None), _imports(list[type])
    (False, True)
    """
    origin = typing.get_origin(hint)
    if hint in (None, Any, inspect.Parameter.empty) or origin is Literal:
        return False
    if type(hint).__name__ in _UNTYPED:
        return False
    if origin is typing.Annotated or origin in (typing.Union, types.UnionType, *_CONTAINERS):
        return any(map(_imports, filter(lambda part: part is not ..., typing.get_args(hint))))
    if not isinstance(hint, type) or origin is not None:
        return True
    plain = (*_ATOMS, *_CONTAINERS, enum.Enum, os.PathLike)
    return not issubclass(hint, plain)


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
        foreign: Those that are objects there, which are not built: their classes by name.
    """

    option: str
    build: Callable[..., object]
    configuration: Configuration | None = None
    stored: Mapping[str, object] = field(default_factory=dict)
    foreign: Mapping[str, str] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """Where it is imported from."""
        return f"{self.build.__module__}.{getattr(self.build, '__qualname__', self.build)}"

    def starting_from(
        self, stored: Mapping[str, object], foreign: Mapping[str, str], whole: str | None
    ) -> Subject:
        """Return the subject with the hyper-parameters of a checkpoint to start from.

        Args:
            stored: The hyper-parameters by name.
            foreign: The classes of those that are objects, by name.
            whole: The argument that was given all of them; None where each was one.
        """
        if whole in annotations_of(self.build):
            foreign = {f"{whole}.{name}": class_name for name, class_name in foreign.items()}
            stored = {whole: stored} if stored or foreign else {}
        return replace(self, stored=stored, foreign=foreign)

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
            parser.set_defaults(usable_defaults(parser, self.option, stored)[0])
            parser.get_defaults()
        with failing_as(f"the configuration of --{self.option} {self.path}"):
            parser.set_defaults({f"{self.option}.{name}": v for name, v in configured.items()})
            parser.get_defaults()

    def check_given(self, parser: ArgumentParser, given: Iterable[str]) -> None:
        """Make sure that what the checkpoint holds and cannot be used is given in another way.

        Args:
            parser: The parser, to which the arguments were added.
            given: The arguments of the command line.

        Raises:
            ConfigurationError: The model would silently be another one.
        """
        known = parser.get_defaults().get(self.option) or {}
        configured = self._configured(known)
        words = [word.removeprefix("--").partition("=")[0].removesuffix("+") for word in given]
        unusable = dict.fromkeys(usable_defaults(parser, self.option, self.stored)[1], "")
        for name, class_name in self.foreign.items():
            if name.partition(".")[0] in known:
                unusable[f"{self.option}.{name}"] = f", a {class_name}"
        for name, what in unusable.items():
            is_given = any(f"{word}.".startswith(f"{name}.") for word in words)
            if not is_given and name.split(".")[1] not in configured:
                raise ConfigurationError(
                    f"the checkpoint stores {name} as an object{what}, which is not rebuilt: "
                    f"pass --{name}"
                )

    def _declare(self, parser: ArgumentParser) -> None:
        """Add the arguments by their types, and those without one by what was stored for them."""
        alone = ArgumentParser(exit_on_error=False)
        self._add(alone, set())
        known = vars(alone.get_defaults().get(self.option) or Namespace())  # type: ignore[no-untyped-call]
        values = {**self.stored, **dict.fromkeys(self.foreign)}
        by_value = arguments_by_value(self.build, values, known)
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


# The data that a command line names: a data module, a loader, or those of the model itself.


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
