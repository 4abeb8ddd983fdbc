"""Hyper-parameters of a checkpoint as defaults of arguments; nothing that they name is imported."""

from __future__ import annotations

import argparse
import enum
import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from bnguard.checkpoint.result import Checkpoint, StoredArguments

# The key by which jsonargparse recognises the description of an object to import.
_DESCRIBES_OBJECT = "class_path"
# jsonargparse's types of arguments that take any value as it is.
_UNTYPED = ("UntypedType", "UnvalidatedType")
# Types by which an argument without annotation is added, so that the command line can change it.
_TYPES_BY_VALUE = (str, bool, int, float)
# Namespaces of argparse, Lightning and OmegaConf.
_SETTINGS = (argparse.Namespace.__name__, "AttributeDict", "DictConfig")
_ATOMS = (str, bool, int, float, complex, bytes, types.NoneType)
_CONTAINERS = (list, tuple, set, frozenset, dict)


def arguments_for(
    checkpoint: Checkpoint, option: str, build: Callable[..., object]
) -> StoredArguments:
    """Return what a checkpoint stores for ``build``, named as its arguments are."""
    match option:
        case "model":
            stored = checkpoint.hyper_parameters
        case "data":
            stored = checkpoint.data_hyper_parameters
        case _:
            return StoredArguments()
    whole = stored.argument
    if whole not in annotations_of(build):
        return stored
    objects = {f"{whole}.{name}": class_name for name, class_name in stored.objects.items()}
    return StoredArguments({whole: stored.values} if stored.values or objects else {}, objects)


def usable_defaults(
    parser: ArgumentParser, option: str, values: Mapping[str, object]
) -> tuple[dict[str, object], list[str]]:
    """Return the values that an argument ``--OPTION.NAME`` takes and that lead to no import.

    The keys are full names. The names of the values that cannot be used are returned too.
    """
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    leaves = list(_leaves(option, values, hints))
    usable = {name: value for name, value in leaves if _is_harmless(value, hints[name])}
    return usable, [name for name, _ in leaves if name not in usable]


class Settings(dict[str, Any]):
    """A dictionary whose values are attributes too, like those of a stored namespace.

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
    """Convert a mapping to the kind of namespace that an argument with this annotation takes.

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


def types_by_value(
    build: Callable[..., object], stored: StoredArguments, known: Mapping[str, object]
) -> dict[str, Any]:
    """Return types for arguments that the signature leaves open and the stored values decide.

    These are mappings for an argument without annotation or for a namespace; and, if ``**kwargs``
    lead to no names, everything that was stored beyond the ``known`` arguments.
    """
    named = annotations_of(build)
    parameters = inspect.signature(build).parameters.values()
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters) and known.keys() <= {*named}
    kinds: dict[str, Any] = {}
    for name, value in {**stored.values, **dict.fromkeys(stored.objects)}.items():
        if not name.isidentifier() or name.startswith("_"):
            continue
        is_settings = isinstance(value, Mapping) and _takes_settings(named.get(name))
        if is_settings if name in named else takes_any:
            kinds[name] = _type_by_value(value)
    return kinds


def annotations_of(build: Callable[..., object]) -> dict[str, object]:
    """Return the annotations of the arguments of a class or function by name."""
    return {
        name: parameter.annotation
        for name, parameter in inspect.signature(build).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def _takes_settings(hint: object) -> bool:
    """Return whether an argument may take a namespace; its annotation may be a string."""
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
    """Yield values by their full names; those of a data class, which is a group, one by one."""
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
    """Return whether YAML, as which jsonargparse reads a text, turns it into a structure.

    That could describe an object, with escapes that hide the word ``class_path``.

    >>> _is_structure("resnet50"), _is_structure('{"a": 1}')
    (False, True)
    """
    try:
        return isinstance(yaml.safe_load(text), (dict, list, set, tuple))
    except yaml.YAMLError:
        return False  # a text for jsonargparse as well
    except (RecursionError, ValueError):
        return True


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value:
            yield from _texts(item)
        if isinstance(value, Mapping):
            yield from _texts(list(value.values()))


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
        return any(_imports(part) for part in typing.get_args(hint) if part is not ...)
    if not isinstance(hint, type) or origin is not None:
        return True
    return not issubclass(hint, (*_ATOMS, *_CONTAINERS, enum.Enum, os.PathLike))
