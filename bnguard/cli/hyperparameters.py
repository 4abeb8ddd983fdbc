"""Hyper-parameters of a checkpoint as defaults of arguments, without importing what they name.

For an argument that takes an object, a class or a function, jsonargparse imports whatever path
its value holds; a path that a checkpoint holds must not be followed.
"""

from __future__ import annotations

import enum
import inspect
import os
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

# What jsonargparse takes for the description of an object to import, in a dictionary or in YAML.
_DESCRIBES_OBJECT = "class_path"

# The classes of what jsonargparse has for an argument without a type, or with one that it cannot
# find: any value is taken as it is.
_UNTYPED = ("UntypedType", "UnvalidatedType")

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


def _leaves(
    prefix: str, values: Mapping[str, object], hints: Mapping[str, object]
) -> Iterator[tuple[str, object]]:
    """Yield the values by their full names; those of a data class, which is a group, one by one."""
    for key, value in values.items():
        name = f"{prefix}.{key}"
        is_group = any(known.startswith(f"{name}.") for known in hints)
        if is_group and isinstance(value, Mapping):
            yield from _leaves(name, value, hints)
        elif name in hints and not is_group:
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
