"""What a pickle asks for, written down instead of done: inert stand-ins for everybody's objects.

A pickle is a program that imports classes and calls them. Here nothing is imported and nothing is
called: a class becomes a :class:`Reference`, an object an :class:`InertObject` that lists what it
would have been built from. Tensors alone are rebuilt, as :class:`StoredTensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from bnguard.checkpoint.dtypes import CARRIERS, STORAGE_DTYPES
from bnguard.checkpoint.files import Source
from bnguard.checkpoint.stored_tensors import Storage, StoredTensor

# What a plain value may consist of besides lists, tuples and dictionaries.
ATOMS = (type(None), bool, int, float, complex, str, bytes)

_COPYREG = ("copyreg", "copy_reg")
_MOST_DIMENSIONS = 64
_LARGEST_SIZE = 2**60
_MOST_NESTED = 64
_MOST_PLAIN_VALUES = 1_000_000


@dataclass(frozen=True, slots=True)
class Reference:
    """The name of a class or function that a pickle mentions; it is never imported.

    >>> str(Reference("os", "system"))
    'os.system'
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False, slots=True)
class InertObject:
    """An object that a pickle describes; nothing of it exists.

    Attributes:
        made_by: What would have been called: a :class:`Reference`, or another inert object.
        args: What it would have been called with.
        state: What the object would have been given as its state.
        items: What would have been appended or added to it; None where nothing was.
        pairs: What would have been set in it by key; None where nothing was.
    """

    made_by: object
    args: object = ()
    state: object = None
    items: list[object] | None = None
    pairs: dict[object, object] | None = None

    @property
    def class_name(self) -> str:
        """Dotted name of the class or function."""
        made_by: object = self
        for _ in range(_MOST_NESTED):
            if not isinstance(made_by, InertObject):
                break
            made_by = _class_for_copyreg(made_by) or made_by.made_by
        return str(made_by) if isinstance(made_by, Reference) else "an unnamed object"

    # A generated one would follow whatever the object refers to, without end.
    def __repr__(self) -> str:
        return f"<{self.class_name}>"


def _class_for_copyreg(made: InertObject) -> object:
    """Return the class of an object that copyreg would have built: its first argument."""
    is_copyreg = isinstance(made.made_by, Reference) and made.made_by.module in _COPYREG
    return made.args[0] if is_copyreg and isinstance(made.args, tuple) and made.args else None


@dataclass(frozen=True, eq=False)
class Blob:
    """A text or byte string too long to keep; its place in the file is."""

    place: Source


@dataclass(frozen=True, eq=False)
class TypedStorage:
    """A storage and the element type that its class implies; None for untyped ones."""

    storage: Storage
    dtype: str | None


def storage_dtype(storage_class: object) -> str | None:
    """Return the element type that the name of a storage's class implies; None for untyped ones."""
    name = storage_class.name if isinstance(storage_class, Reference) else ""
    return STORAGE_DTYPES.get(name)


def call(made_by: object, args: object) -> object:
    """Return what a pickle's call makes: a tensor, a container, or an inert object.

    Raises:
        ValueError: A tensor is described by something that cannot be one.
        TypeError: Likewise.
    """
    rebuild = _REBUILDS.get(str(made_by)) if isinstance(made_by, Reference) else None
    if rebuild is None or not isinstance(args, tuple):
        return InertObject(made_by, args)
    return rebuild(*args)


def _rebuild_tensor(
    storage: object, start: object, shape: object, stride: object, *_: object
) -> object:
    if not isinstance(storage, TypedStorage) or storage.dtype is None:
        raise ValueError("a tensor without a storage")
    return _viewing(storage.storage, storage.dtype, start, shape, stride)


def _rebuild_tensor_v3(
    storage: object,
    start: object,
    shape: object,
    stride: object,
    requires_grad: object,
    hooks: object,
    dtype: object,
    *_: object,
) -> object:
    if not isinstance(storage, TypedStorage) or not isinstance(dtype, Reference):
        raise ValueError("a tensor without a storage")
    return _viewing(storage.storage, dtype.name, start, shape, stride)


def _rebuild_meta_tensor(dtype: object, shape: object, *_: object) -> object:
    if not isinstance(dtype, Reference) or dtype.name not in CARRIERS:
        raise ValueError("a tensor without a type")
    return StoredTensor(dtype.name, _sizes(shape), tuple)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _rebuild_from_type(function: object, cls: object, args: object, state: object) -> object:
    """Return a tensor of a class of its own, or with attributes, as a plain one."""
    is_tensor = str(function).startswith("torch._utils._rebuild_tensor")
    return call(function, args) if is_tensor else InertObject(cls, (function, args), state)


def _ordered_dict(*args: object) -> object:
    pairs = {}
    for pair in args[0] if args and isinstance(args[0], (list, tuple)) else ():
        key, value = pair
        pairs[as_key(key)] = value
    return InertObject(Reference("collections", "OrderedDict"), pairs=pairs)


def _size(*args: object) -> object:
    return _sizes(args[0]) if args else ()


# Every other name in a pickle stays a name.
_REBUILDS: dict[str, Callable[..., object]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_meta_tensor_no_storage": _rebuild_meta_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _rebuild_parameter,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "collections.OrderedDict": _ordered_dict,
    "torch.Size": _size,
}


def _viewing(
    storage: Storage, dtype: str, start: object, shape: object, stride: object
) -> StoredTensor:
    if dtype not in CARRIERS:
        raise ValueError(f"a tensor of unknown type {dtype}")
    sizes, steps = _sizes(shape), _sizes(stride)
    (first,) = _sizes((start,))
    if len(sizes) != len(steps):
        raise ValueError("a tensor whose shape and strides differ in length")
    return StoredTensor.viewing(storage, dtype, sizes, first, steps)


def _sizes(values: object) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > _MOST_DIMENSIONS:
        raise ValueError("a shape that is none")
    if not all(type(value) is int and 0 <= value < _LARGEST_SIZE for value in values):
        raise ValueError("a shape that is none")
    return tuple(values)


def as_key(key: object) -> object:
    """Return what can stand for the key of a dictionary, without hashing anything deep.

    The hash of a tuple visits all it contains, which a few bytes of pickle can make endless.
    """
    if isinstance(key, (*ATOMS, Reference, InertObject, Blob)):
        return key
    if isinstance(key, tuple) and len(key) < 16 and all(isinstance(k, ATOMS) for k in key):
        return key
    return InertObject(Reference("builtins", type(key).__name__), (key,))


class NotPlainError(Exception):
    """A value that contains an object of a class, or is too large to be plain data."""


def plain(value: object) -> object:
    """Return a value as plain data: atoms, lists, tuples and dictionaries.

    Dictionaries of other classes become dictionaries, namespaces too, paths become strings.

    Raises:
        NotPlainError: It holds an object of another class; the argument names that.

    >>> plain([1, {"a": InertObject(Reference("argparse", "Namespace"), state={"lr": 0.1})}])
    [1, {'a': {'lr': 0.1}}]
    """
    return _plain(value, iter(range(_MOST_PLAIN_VALUES)), _MOST_NESTED)


def _plain(value: object, budget: Iterator[int], depth: int) -> object:
    if depth == 0 or next(budget, None) is None:
        raise NotPlainError("a value that is nested too deeply or too large")

    def each(values: Iterable[object]) -> list[object]:
        return [_plain(item, budget, depth - 1) for item in values]

    if isinstance(value, ATOMS):
        return value
    if isinstance(value, list):
        return each(value)
    if isinstance(value, tuple):
        return tuple(each(value))
    if isinstance(value, Reference) and value.module == "torch":
        return str(value)
    if isinstance(value, InertObject) and value.class_name.startswith("pathlib."):
        return str(PurePosixPath(*(str(part) for part in each(_as_sequence(value.args)))))
    mapping = mapping_of(value)
    if mapping is None:
        raise NotPlainError(_class_of(value))
    keys = [key if isinstance(key, ATOMS) else str(key) for key in mapping]
    return dict(zip(keys, each(mapping.values()), strict=True))


def mapping_of(value: object) -> dict[object, object] | None:
    """Return the pairs of a dictionary, of an inert object that is one, or of a namespace."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, InertObject):
        return None
    if value.class_name.endswith(".Namespace") and isinstance(value.state, dict):
        return value.state
    is_mapping = value.pairs is not None or value.class_name.endswith("Dict")
    return value.pairs or {} if is_mapping and not value.items else None


def _as_sequence(value: object) -> Iterable[object]:
    return value if isinstance(value, (tuple, list)) else ()


def _class_of(value: object) -> str:
    if isinstance(value, InertObject):
        return value.class_name
    return str(value) if isinstance(value, Reference) else type(value).__name__
