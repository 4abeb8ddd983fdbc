"""The classes and functions that a command line names, as LightningCLI names model and data.

``--model pkg.LitModel --model.width 64 --data pkg.DataModule``, a function instead of a class,
or ``--config config.yaml`` as LightningCLI saves it. Only what the user names is imported, never a
path that a checkpoint holds.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from bnguard.checkpoint.result import StoredArguments
from bnguard.cli.output import failing_as, missing_arguments
from bnguard.cli.stored_arguments import (
    annotations_of,
    as_argument,
    types_by_value,
    usable_defaults,
)
from bnguard.errors import ConfigurationError, nearest_name

if TYPE_CHECKING:
    from torch import nn

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class LightningConfig:
    """A configuration file as LightningCLI saves it, with sections ``"model"`` and ``"data"``.

    One that was found next to a checkpoint, not named by the user, may belong to another model, and
    is ignored if it does not fit.
    """

    path: Path
    sections: Mapping[str, object]
    is_named: bool

    def section(self, option: str) -> tuple[str | None, Mapping[str, Any]]:
        """Return the class and the arguments of the model or the data.

        The class is None if LightningCLI was given fixed classes: it then saves arguments alone.
        """
        section = self.sections.get(option)
        if not isinstance(section, dict):
            return None, {}
        path = section.get("class_path")
        arguments = section if path is None else section.get("init_args")
        return path, arguments if isinstance(arguments, dict) else {}


def find_config(checkpoint: Path) -> LightningConfig | None:
    """Return the configuration that LightningCLI saved with a checkpoint; None if there is none.

    The folder of a run holds ``config.yaml``, and a folder below it the checkpoints.
    """
    folder = checkpoint.absolute().parent
    for path in (folder / "config.yaml", folder.parent / "config.yaml"):
        try:
            config = read_config(path, is_named=False)
        except ConfigurationError:
            continue
        if any(isinstance(config.sections.get(option), dict) for option in ("model", "data")):
            return config
    return None


def read_config(path: Path, *, is_named: bool = True) -> LightningConfig:
    """Read a configuration file."""
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigurationError(f"--config {path} cannot be read: {reason}") from error
    # A file for all subcommands has a section for each.
    if isinstance(content, dict) and "model" not in content:
        content = content.get("fit", content)
    if not isinstance(content, dict):
        raise ConfigurationError(f"--config {path} has no 'model' and 'data' sections")
    return LightningConfig(path, content, is_named)


@dataclass(frozen=True)
class Factory:
    """The class or function that makes the model or the data, and where its arguments come from.

    Attributes:
        option: ``"model"``, ``"data"`` or ``"reference"``.
        build: The class or function.
        config: The configuration file with its arguments, if there is one.
        stored: Arguments that the checkpoint stores, which are the defaults.
    """

    option: str
    build: Callable[..., object]
    config: LightningConfig | None = None
    stored: StoredArguments = field(default_factory=StoredArguments)

    @property
    def path(self) -> str:
        """Where it is imported from."""
        return f"{self.build.__module__}.{getattr(self.build, '__qualname__', self.build)}"

    @property
    def has_loaders(self) -> bool:
        """Whether it is a class with loaders of its own, as a Lightning module may be."""
        return isinstance(self.build, type) and any(_has_loader(self.build, s) for s in _SPLITS)

    def add_arguments(self, parser: ArgumentParser, given: Collection[str]) -> None:
        """Add the arguments of the class or function as ``--model.NAME``.

        Defaults are the stored hyper-parameters that it takes and that import nothing; the
        configuration file overrides them. A stored object is not rebuilt: its name, as
        ``model.body``, has to be among those given on the command line.
        """
        self._declare(parser)
        known = parser.get_defaults().get(self.option) or {}
        configured = self._choose_configured(known)
        with failing_as(f"the arguments that are stored for --{self.option} {self.path}"):
            usable, unusable = usable_defaults(parser, self.option, self.stored.values)
            stored = {k: v for k, v in usable.items() if k.split(".")[1] not in configured}
            parser.set_defaults(stored)
            parser.get_defaults()
        with failing_as(f"the configuration of --{self.option} {self.path}"):
            parser.set_defaults({f"{self.option}.{name}": v for name, v in configured.items()})
            parser.get_defaults()
        self._check_names(parser, given)
        self._check_untyped({*given, *(f"{self.option}.{name}" for name in configured)})
        objects = dict.fromkeys(unusable, "")
        for name, class_name in self.stored.objects.items():
            if name.partition(".")[0] in known:
                objects[f"{self.option}.{name}"] = f", a {class_name}"
        for name, what in objects.items():
            is_given = any(_is_part(one, name) for one in given)
            if not is_given and name.split(".")[1] not in configured:
                raise ConfigurationError(
                    f"the checkpoint stores {name} as an object{what}, which is not rebuilt: "
                    f"pass --{name}"
                )

    def _check_names(self, parser: ArgumentParser, given: Collection[str]) -> None:
        """Refuse an option on the command line that is not an argument, nor a part of one."""
        dests = [a.dest for a in parser._actions if a.dest.startswith(f"{self.option}.")]
        for name in given:
            is_other = not name.startswith(f"{self.option}.")
            if is_other or any(_is_part(name, one) or _is_part(one, name) for one in dests):
                continue
            near = nearest_name(name, dests)
            meant = f"did you mean --{near}? " if near else ""
            listed = ", ".join(f"--{one}" for one in dests) or "no arguments"
            raise ConfigurationError(f"--{name} does not exist: {meant}it takes {listed}")

    def _check_untyped(self, given: Collection[str]) -> None:
        """Refuse to call without an argument that has no default; jsonargparse passes None.

        It does so for arguments without annotation.
        """
        needed = [
            f"{self.option}.{name}"
            for name, parameter in inspect.signature(self.build).parameters.items()
            if parameter.annotation is parameter.empty is parameter.default
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and name not in {**self.stored.values, **self.stored.objects}
        ]
        missing = [name for name in needed if not any(_is_part(one, name) for one in given)]
        if missing:
            raise ConfigurationError(missing_arguments(missing))

    def make(self, values: Namespace) -> object:
        """Call the class or function with the parsed arguments."""
        parser = ArgumentParser(exit_on_error=False)
        self._declare(parser)
        with failing_as(f"--{self.option} {self.path}"):
            arguments = values.get(self.option) or Namespace()  # type: ignore[no-untyped-call]
            given = Namespace({self.option: arguments})  # type: ignore[no-untyped-call]
            return self.build(**self.arguments(parser.instantiate(given)[self.option]))

    def make_model(self, values: Namespace) -> nn.Module:
        """Return the model."""
        from torch import nn

        model = self.make(values)
        if not isinstance(model, nn.Module):
            raise ConfigurationError(
                f"--model {self.path} returns a {type(model).__name__}, not a torch.nn.Module"
            )
        # Large Lightning models create their layers there.
        configure = getattr(model, "configure_model", None)
        if configure is not None and not configure.__qualname__.startswith("ModelHooks."):
            with failing_as(f"--model {self.path}: configure_model()"):
                configure()
        return model

    def arguments(self, values: Namespace) -> dict[str, object]:
        """Return values by argument name, with mappings converted to what each argument takes."""
        hints = annotations_of(self.build)
        return {name: as_argument(value, hints.get(name)) for name, value in vars(values).items()}

    def _declare(self, parser: ArgumentParser) -> None:
        """Add the arguments by their annotations, or by the stored values if they have none."""
        alone = ArgumentParser(exit_on_error=False)
        self._add(alone, set())
        known = vars(alone.get_defaults().get(self.option) or Namespace())  # type: ignore[no-untyped-call]
        by_value = types_by_value(self.build, self.stored, known)
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

    def _choose_configured(self, known: Container[str]) -> Mapping[str, Any]:
        if self.config is None:
            return {}
        _, arguments = self.config.section(self.option)
        unknown = next((name for name in arguments if name not in known), None)
        if unknown is None:
            return arguments
        if self.config.is_named:
            raise ConfigurationError(
                f"{self.config.path} gives the {self.option} {unknown!r}, which "
                f"{self.path} does not take: name the class that it is for with --{self.option}"
            )
        return {}


def _is_part(name: str, whole: str) -> bool:
    """Return whether an option is another one or a part of it: ``model.cfg.lr`` of ``model.cfg``.

    >>> _is_part("model.cfg.lr", "model.cfg"), _is_part("model.cfgs", "model.cfg")
    (True, False)
    """
    return f"{name}.".startswith(f"{whole}.")


def find_factory(option: str, named: str | None, config: LightningConfig | None) -> Factory | None:
    """Return what the command line names for an option, or the configuration; None without both."""
    configured = None if config is None else config.section(option)[0]
    path = named or configured
    if path is None:
        return None
    if named is None and path.startswith("__main__."):
        assert config is not None
        raise ConfigurationError(
            f"{config.path} names {path}, a class of the script that was run: "
            f"name it as --{option} script.{path.removeprefix('__main__.')}"
        )
    # A class of the script itself has no module there.
    in_script = f"__main__.{path.replace(':', '.').rpartition('.')[2]}"
    is_for_it = configured in (None, path, in_script)
    return Factory(option, _import(path, option), config if is_for_it else None)


def _import(path: str, option: str) -> Callable[..., object]:
    """Import ``package.module.Name``, ``package.module:name`` or ``file.py:Name``."""
    file, _, name = path.rpartition(":")
    folder = Path()
    if file.endswith(".py"):
        folder, module_name = _module_of_file(Path(file), f"--{option} {path}")
    else:
        module_name, _, name = path.replace(":", ".").rpartition(".")
    if not module_name or path.endswith(".py"):
        raise ConfigurationError(
            f"--{option} {path}: write it as package.module.Name, or file.py:Name"
        )
    searched = "" if folder == Path() else str(folder)
    if searched not in sys.path:
        sys.path.insert(0, searched)
    try:
        with failing_as(f"--{option} {path}: the import"), _without_usage():
            module = importlib.import_module(module_name)
    except ConfigurationError as error:
        if isinstance(error.__cause__, SystemExit):
            raise ConfigurationError(
                f"--{option} {path}: {module_name} parses arguments or exits when it is imported: "
                "move that under if __name__ == '__main__'"
            ) from error
        missing = getattr(error.__cause__, "name", None)
        is_absent = isinstance(error.__cause__, ModuleNotFoundError) and missing
        if not is_absent or not f"{module_name}.".startswith(f"{missing}."):
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
    # What a partial object calls, jsonargparse does not see.
    if isinstance(found, partial) or _is_ready(found):

        def ready() -> object:
            return found() if isinstance(found, partial) else found

        ready.__module__, ready.__qualname__ = module_name, name
        return ready
    if not callable(found):
        raise ConfigurationError(
            f"--{option} {path} is a {type(found).__name__}: name a class, or a function that "
            "returns it"
        )
    try:
        inspect.signature(found)
    except ValueError as error:
        raise ConfigurationError(
            f"--{option} {path} does not tell its arguments: name a function that calls it"
        ) from error
    return found


@contextmanager
def _without_usage() -> Iterator[None]:
    """Keep argparse from printing the usage of a script that parses arguments when imported.

    The standard error is not redirected instead: a logger that the script makes would keep that.
    """
    printed = argparse.ArgumentParser._print_message
    argparse.ArgumentParser._print_message = lambda *_: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        argparse.ArgumentParser._print_message = printed  # type: ignore[method-assign]


def _is_ready(found: object) -> bool:
    """Return whether this is a model, a data module or a loader, and not what makes one."""
    from torch import nn

    if isinstance(found, type):
        return False
    is_loader = isinstance(found, Iterable) and not isinstance(found, (str, bytes, Mapping))
    return isinstance(found, nn.Module) or is_loader or any(_has_loader(found, s) for s in _SPLITS)


def _module_of_file(file: Path, what: str) -> tuple[Path, str]:
    """Return the folder from which a file is imported, and the name of its module there."""
    file = file.absolute()
    if not file.is_file():
        raise ConfigurationError(f"{what}: {file} does not exist")
    folder, name = file.parent, file.stem
    while (folder / "__init__.py").is_file():
        folder, name = folder.parent, f"{folder.name}.{name}"
    loaded = getattr(sys.modules.get(name), "__file__", str(file))
    if name in sys.modules and Path(loaded or "").resolve() != file.resolve():
        raise ConfigurationError(f"{what}: a module named {name!r} exists; rename the file")
    return folder, name


@dataclass(frozen=True)
class Data:
    """The data of a command: a data module, a model with loaders of its own, or a single loader."""

    path: str
    source: object
    _stages: set[str] = field(default_factory=set, init=False, repr=False)

    @property
    def is_module(self) -> bool:
        """Whether it has splits; the batches of a single loader may have no labels."""
        return any(self.has(split) for split in _SPLITS)

    def has(self, split: str) -> bool:
        """Return whether there is a loader for this split."""
        return _has_loader(self.source, split)

    def loader(self, split: str) -> Iterable[object]:
        """Return the loader of a split; a single loader serves as any of them."""
        from torch.utils.data import DataLoader

        name = f"{split}_dataloader"
        if not self.has(split):
            if not self.is_module and isinstance(self.source, Iterable):
                return self.source
            its = [known for known in _SPLITS if self.has(known)]
            none = "name a data module, or a function that returns a loader"
            other = f"use --split {its[0]}" if its else none
            raise ConfigurationError(f"--data {self.path} has no {name}(): {other}")
        with failing_as(f"--data {self.path}: {name}()"):
            self._set_up("test" if split == "test" else "fit")
            loader: object = getattr(self.source, name)()
        if isinstance(loader, Mapping):
            loader = list(loader.values())
        if isinstance(loader, (list, tuple)) and loader and isinstance(loader[0], DataLoader):
            loader = loader[0]
        if not isinstance(loader, Iterable):
            raise ConfigurationError(f"--data {self.path} returns no {name}")
        return loader

    def _set_up(self, stage: str) -> None:
        """Prepare the data once a stage, since a second random split would be another one."""
        if stage in self._stages:
            return
        source: Any = self.source
        if not self._stages:
            source.prepare_data()
        self._stages.add(stage)
        source.setup(stage)


def _has_loader(source: object, split: str) -> bool:
    method = getattr(source, f"{split}_dataloader", None)
    # Those of Lightning's base classes only raise.
    return method is not None and not method.__qualname__.startswith("DataHooks.")
