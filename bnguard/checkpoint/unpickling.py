"""A pickle machine that executes nothing: it runs the opcodes, never what they ask for.

Python's own unpickler can be told which classes to find, yet leaves doors open: a cache of
extension codes, state set on whatever lies on the stack, a memo as large as a number in the file.
This one knows lists, tuples, dictionaries, text, numbers, and inert stand-ins for everybody's
objects. It is not recursive, and what it keeps is bounded. ``pickletools`` of the standard library
says which opcodes there are in protocols 0 to 5, and reads what follows them.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from bnguard.checkpoint.files import Source
from bnguard.checkpoint.stored_tensors import (
    CARRIERS,
    STORAGE_DTYPES,
    NumpyStorage,
    Storage,
    StoredTensor,
)
from bnguard.errors import CheckpointError, printable

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


_ARRAY_MODULES = ("numpy.core.", "numpy._core.")
# Types of NumPy by their codes, which torch's names share but for what only torch has.
_NUMPY_DTYPES = {"b1": "bool"} | {
    code: name for name, code in CARRIERS.items() if np.dtype(code).name == name
}


def array_as_tensor(made: InertObject) -> StoredTensor | None:
    """Return a pickled NumPy array or scalar of numbers as a tensor; None for anything else.

    Only what lies in C order with its bytes in the pickle is read.
    """
    function, args, state = made.made_by, made.args, made.state
    if not isinstance(function, Reference) or not function.module.startswith(_ARRAY_MODULES):
        return None
    match function.name, args, state:
        case "_reconstruct", _, (_, shape, dtype, False, data):
            pass
        case "scalar", (dtype, data), _:
            shape = ()
        case "_frombuffer", (data, dtype, shape, "C"), _:
            pass
        case _:
            return None
    if not isinstance(dtype, InertObject) or str(dtype.made_by) != "numpy.dtype":
        return None
    match dtype.args, dtype.state:
        case (str(code), *_), (_, "<" | ">" | "|" | "=" as order, *_) if code in _NUMPY_DTYPES:
            name = _NUMPY_DTYPES[code]
        case _:
            return None
    content = _bytes_of(data)
    try:
        sizes = _sizes(shape)
    except ValueError:
        return None
    if content is None or math.prod(sizes) * np.dtype(code).itemsize != content.size:
        return None
    byteorder = "big" if order == ">" else "little"
    return StoredTensor.viewing(NumpyStorage(content.size, byteorder, content), name, sizes)


def _bytes_of(data: object) -> Source | None:
    """Return the bytes of an array; before protocol 3 they are text, a character each."""
    if isinstance(data, Blob):
        return data.place
    if isinstance(data, InertObject) and str(data.made_by) == "_codecs.encode":
        match data.args:
            case (str(text), "latin1" | "latin-1") if text.isascii() or max(text) <= "\xff":
                data = text.encode("latin-1")
    return Source(Path(), io.BytesIO(data), 0, len(data)) if isinstance(data, bytes) else None


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


# The most opcodes one pickle may have: each keeps some 100 bytes at most, and a checkpoint has
# some 50 a tensor.
_MOST_OPCODES = 10_000_000
# A longer text stays in the file; so does every one once the texts kept are this much together.
_LONGEST_TEXT_BYTES = 2**16
_MOST_TEXT_BYTES = 2**27
_LONGEST_INTEGER_BYTES = 1024

_MALFORMED = (LookupError, TypeError, ValueError, OverflowError, struct.error)


def read_pickle(
    source: Source,
    stream: BinaryIO,
    resolve_storage: Callable[[tuple[object, ...]], object],
) -> object:
    """Read one pickle from where the stream stands; the stream is left behind its end.

    Args:
        source: Where the stream comes from, for messages and for texts too long to keep.
        stream: The bytes.
        resolve_storage: Returns what a persistent identifier of torch stands for.

    Raises:
        CheckpointError: It is no pickle, is damaged, or is too large.
    """
    machine = _Machine(source, stream, resolve_storage)
    try:
        return machine.run()
    except _MALFORMED as error:
        raise damaged(source.path, str(error)) from error


def damaged(path: Path, detail: str) -> CheckpointError:
    """Return the error for a file whose pickle makes no sense."""
    # A detail may quote the file; a short piece of it is enough.
    return CheckpointError(f"{path}: damaged, or no checkpoint ({printable(detail[:80])})")


class _Machine:
    """The stack, the marks and the memo of a pickle that is being read."""

    def __init__(
        self,
        source: Source,
        stream: BinaryIO,
        resolve_storage: Callable[[tuple[object, ...]], object],
    ) -> None:
        self.source = source
        self.stream = stream
        self.resolve_storage = resolve_storage
        self.stack: list[object] = []
        self.below_marks: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.text_bytes = 0

    def run(self) -> object:
        for _ in range(_MOST_OPCODES):
            code = self.stream.read(1)
            if not code:
                raise self.source.truncated()
            opcode = _OPCODES.get(code)
            if opcode is None:
                raise ValueError(f"opcode {code!r}")
            if opcode.name == "STOP":
                return self.stack.pop()
            _OPERATIONS[opcode.name](self, self.argument(opcode))
        raise CheckpointError(
            f"{self.source.path}: its pickle has more than {_MOST_OPCODES:,} opcodes, more than "
            "bnguard reads; save the state dict alone"
        )

    def argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        """Read what follows an opcode; a text that is too long stays in the file."""
        kind = opcode.arg
        if kind is None:
            return None
        # What pickletools would read as Python 3 has it: Python 2 wrote any encoding, any escape.
        if opcode.name == "STRING":
            return _quoted(self.line())
        if opcode.name in ("GLOBAL", "INST"):
            return self.line(), self.line()
        if opcode.name == "PERSID":
            return self.line()
        layout = _SIZES.get(kind.n)
        if layout is None:
            value = kind.reader(self.stream)
            if isinstance(value, int) and value.bit_length() > 8 * _LONGEST_INTEGER_BYTES:
                raise ValueError("an integer that is too long")
            return value
        (size,) = layout.unpack(self.bytes_of(layout.size))
        if opcode.name in ("LONG1", "LONG4"):
            if not 0 <= size <= _LONGEST_INTEGER_BYTES:
                raise ValueError("an integer that is too long")
            return int.from_bytes(self.bytes_of(size), "little", signed=True)
        data = self.data(size)
        if isinstance(data, Blob) or "BYTE" in opcode.name:
            return data
        return data.decode("utf-8", "surrogatepass" if "UNICODE" in opcode.name else "replace")

    def line(self) -> str:
        line = self.stream.readline()
        if not line.endswith(b"\n"):
            raise ValueError("a line that is too long")
        return line[:-1].decode("utf-8")

    def bytes_of(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) < size:
            raise self.source.truncated()
        return data

    def data(self, size: int) -> bytes | Blob:
        if size < 0:
            raise self.source.truncated()
        if size > _LONGEST_TEXT_BYTES or self.text_bytes + size > _MOST_TEXT_BYTES:
            blob = Blob(self.source.window(self.stream.tell(), size))
            self.stream.seek(size, io.SEEK_CUR)
            return blob
        self.text_bytes += size
        return self.bytes_of(size)

    # The stack.

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below_marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[object]:
        items = self.stack
        self.stack = self.below_marks.pop()
        return items

    def pop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def duplicate(self) -> None:
        self.push(self.stack[-1])

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def memoize(self) -> None:
        self.put(len(self.memo))

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    # Containers.

    def tuple_of(self, size: int) -> None:
        items = tuple(self.stack[-size:])
        if len(items) < size:
            raise IndexError("an empty stack")
        self.stack[-size:] = [items]

    def push_dict(self) -> None:
        items = self.pop_mark()
        self.push({})
        self.set_pairs(items)

    def add(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, InertObject):
            if target.items is None:
                target.items = []
            target = target.items
        if not isinstance(target, list):
            raise TypeError("items for something that is no list")
        target.extend(items)

    def append(self) -> None:
        item = self.stack.pop()
        self.add([item])

    def set_pairs(self, items: list[object]) -> None:
        target = self.stack[-1]
        if isinstance(target, InertObject):
            if target.pairs is None:
                target.pairs = {}
            target = target.pairs
        if not isinstance(target, dict):
            raise TypeError("pairs for something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[as_key(key)] = value

    def set_pair(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_pairs([key, value])

    # Objects: described, never made.

    def reference(self, module: object, name: object) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name that is no text")
        self.push(Reference(module, name))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.reference(module, name)

    def reduce(self) -> None:
        args, made_by = self.stack.pop(), self.stack.pop()
        self.push(call(made_by, args))

    def new_object(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.push(InertObject(cls, args))

    def new_object_with_keywords(self) -> None:
        keywords, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.push(InertObject(cls, (args, keywords)))

    def new_instance(self, module: str, name: str) -> None:
        self.push(InertObject(Reference(module, name), tuple(self.pop_mark())))

    def new_instance_from_stack(self) -> None:
        cls, *args = self.pop_mark()
        self.push(InertObject(cls, tuple(args)))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        # The state of anything else, a tensor's attributes say, holds nothing that is looked for.
        if isinstance(target, InertObject):
            target.state = state

    def new_set(self) -> None:
        self.push(InertObject(_SET))

    def new_frozenset(self) -> None:
        items = self.pop_mark()
        self.push(InertObject(_FROZENSET, items=items))

    def persistent(self, identifier: object) -> None:
        if not isinstance(identifier, tuple):
            raise TypeError("a persistent identifier that is no tuple")
        self.push(self.resolve_storage(identifier))


def _quoted(text: str) -> str:
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise ValueError("a text without quotes")
    return text[1:-1]


_SET, _FROZENSET = Reference("builtins", "set"), Reference("builtins", "frozenset")
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
# How the length of a text is stored, by where pickletools takes it from.
_SIZES = {
    pickletools.TAKEN_FROM_ARGUMENT1: struct.Struct("<B"),
    pickletools.TAKEN_FROM_ARGUMENT4: struct.Struct("<i"),
    pickletools.TAKEN_FROM_ARGUMENT4U: struct.Struct("<I"),
    pickletools.TAKEN_FROM_ARGUMENT8U: struct.Struct("<Q"),
}
_PUSH = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)


def _refuse(machine: _Machine, argument: object) -> None:
    raise ValueError("an opcode that no checkpoint has")


# By the name of an opcode, what it does with its argument, which most do without.
_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **{opcode.name: _refuse for opcode in pickletools.opcodes},
    **dict.fromkeys(_PUSH, _Machine.push),
    # Framing says where the bytes lie, not what they mean.
    **dict.fromkeys(("PROTO", "FRAME"), lambda m, _: None),
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.pop(),
    "POP_MARK": lambda m, _: m.pop_mark(),
    "DUP": lambda m, _: m.duplicate(),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    # Containers.
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    "EMPTY_LIST": lambda m, _: m.push([]),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "EMPTY_SET": lambda m, _: m.new_set(),
    "FROZENSET": lambda m, _: m.new_frozenset(),
    "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.tuple_of(1),
    "TUPLE2": lambda m, _: m.tuple_of(2),
    "TUPLE3": lambda m, _: m.tuple_of(3),
    "LIST": lambda m, _: m.push(m.pop_mark()),
    "DICT": lambda m, _: m.push_dict(),
    "APPEND": lambda m, _: m.append(),
    "APPENDS": lambda m, _: m.add(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.add(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_pair(),
    "SETITEMS": lambda m, _: m.set_pairs(m.pop_mark()),
    # The memo.
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": lambda m, _: m.memoize(),
    # Objects.
    "GLOBAL": lambda m, names: m.reference(*names),
    "STACK_GLOBAL": lambda m, _: m.stack_global(),
    "REDUCE": lambda m, _: m.reduce(),
    "NEWOBJ": lambda m, _: m.new_object(),
    "NEWOBJ_EX": lambda m, _: m.new_object_with_keywords(),
    "INST": lambda m, names: m.new_instance(*names),
    "OBJ": lambda m, _: m.new_instance_from_stack(),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, identifier: m.persistent((identifier,)),
    "BINPERSID": lambda m, _: m.persistent(m.stack.pop()),
}
