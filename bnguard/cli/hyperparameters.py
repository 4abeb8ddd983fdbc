"""Hyper-parameters of a checkpoint as defaults of arguments, without importing what they name.

For an argument that takes an object, a class or a function, jsonargparse imports whatever path
its value holds; a path that a checkpoint holds must not be followed.
"""

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

from bnguard.checkpoint.model import ForeignValue

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


def harmless_defaults(
    parser: ArgumentParser, option: str, values: Mapping[str, object]
) -> dict[str, object]:
    """Return those values that the arguments of a class take, and that lead to no import.

    Args:
        parser: The parser, to which the arguments were added as ``--OPTION.NAME``.
        option: ``"model"`` or ``"data"``.
        values: Values by the name of the argument.

    Returns:
        Values by the full name of the argument.
    """
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    return {
        name: value
        for name, value in _leaves(option, values, hints)
        if _is_harmless(value, hints[name])
    }


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
        if not name.isidentifier() or name.startswith("_") or isinstance(value, ForeignValue):
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
        parts = value.parts if isinstance(value, ForeignValue) else value
        if is_group and isinstance(parts, Mapping):
            yield from _leaves(name, parts, hints)
        elif name not in hints or is_group:
            continue
        elif not isinstance(value, ForeignValue):
            yield name, value
        elif (member := _member(hints[name], value)) is not None:
            yield name, member


def _member(hint: object, value: ForeignValue) -> enum.Enum | None:
    """Return the member of an enumeration that was stored; the argument's type says of which."""
    for cls in (hint, *typing.get_args(hint)):
        if not (isinstance(cls, type) and issubclass(cls, enum.Enum)):
            continue
        if cls.__name__ == value.class_name.rpartition(".")[2] and isinstance(value.parts, tuple):
            return next((member for member in cls if (member.value,) == value.parts), None)
    return None


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
