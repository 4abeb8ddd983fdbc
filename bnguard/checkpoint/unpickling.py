"""A pickle machine that executes nothing: it runs the opcodes, never what they ask for.

Python's own unpickler can be told which classes to find, yet leaves doors open: a cache of
extension codes, state set on whatever lies on the stack, a memo as large as a number in the file.
This one knows lists, tuples, dictionaries, text, numbers, and the stand-ins of ``inert``. It is
not recursive, and what it keeps is bounded. The opcodes are those of protocols 0 to 5, as
``pickletools`` in the standard library documents them.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from bnguard.checkpoint.files import Source
from bnguard.checkpoint.stored_tensors import CARRIERS, STORAGE_DTYPES, Storage, StoredTensor
from bnguard.errors import CheckpointError, printable

# What a pickle asks for, written down instead of done: inert stand-ins for everybody's objects.


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


# The most opcodes one pickle may have: each keeps some 100 bytes at most, and a checkpoint has
# some 50 a tensor.
_MOST_OPCODES = 10_000_000
# A longer text stays in the file; so does every one once the texts kept are this much together.
_LONGEST_TEXT_BYTES = 2**16
_MOST_TEXT_BYTES = 2**27
_LONGEST_LINE_BYTES = 4096
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
        read, opcodes = self.stream.read, _OPCODES
        for _ in range(_MOST_OPCODES):
            opcode = read(1)
            if opcode == b".":
                return self.stack.pop()
            if not opcode:
                raise self.source.truncated()
            operation = opcodes.get(opcode)
            if operation is None:
                raise ValueError(f"opcode {opcode!r}")
            operation(self)
        raise CheckpointError(
            f"{self.source.path}: its pickle has more than {_MOST_OPCODES:,} opcodes, more than "
            "bnguard reads; save the state dict alone"
        )

    # Bytes.

    def bytes_of(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) < size:
            raise self.source.truncated()
        return data

    def number(self, layout: struct.Struct) -> int:
        return int(layout.unpack(self.bytes_of(layout.size))[0])

    def line(self, encoding: str = "utf-8") -> str:
        line = self.stream.readline(_LONGEST_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise ValueError("a line that is too long")
        return line[:-1].decode(encoding)

    def data(self, size: int) -> bytes | Blob:
        if size < 0:
            raise self.source.truncated()
        if size > _LONGEST_TEXT_BYTES or self.text_bytes + size > _MOST_TEXT_BYTES:
            blob = Blob(self.source.window(self.stream.tell(), size))
            self.stream.seek(size, io.SEEK_CUR)
            return blob
        self.text_bytes += size
        return self.bytes_of(size)

    def push_bytes(self, size: int) -> None:
        self.push(self.data(size))

    def push_text(self, size: int) -> None:
        data = self.data(size)
        self.push(data if isinstance(data, Blob) else data.decode("utf-8", "surrogatepass"))

    def push_python2_text(self, size: int) -> None:
        data = self.data(size)
        self.push(data if isinstance(data, Blob) else data.decode("utf-8", "replace"))

    def push_long(self, size: int) -> None:
        if not 0 <= size <= _LONGEST_INTEGER_BYTES:
            raise ValueError("an integer that is too long")
        self.push(int.from_bytes(self.bytes_of(size), "little", signed=True))

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

    def new_instance(self) -> None:
        module, name, args = self.line(), self.line(), tuple(self.pop_mark())
        self.push(InertObject(Reference(module, name), args))

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


def _integer(text: str) -> int:
    if len(text) > _LONGEST_INTEGER_BYTES:
        raise ValueError("an integer that is too long")
    return int(text.removesuffix("L"))


def _integer_or_bool(text: str) -> int:
    return {"00": False, "01": True}[text] if text in ("00", "01") else _integer(text)


def _quoted(text: str) -> str:
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise ValueError("a text without quotes")
    return text[1:-1]


_SET, _FROZENSET = Reference("builtins", "set"), Reference("builtins", "frozenset")
_U1, _U2, _I4, _U4, _U8 = (struct.Struct(f"<{code}") for code in "BHiIQ")
_F8 = struct.Struct(">d")

_OPCODES: dict[bytes, Callable[[_Machine], object]] = {
    b"(": _Machine.mark,
    b"0": _Machine.pop,
    b"1": _Machine.pop_mark,
    b"2": _Machine.duplicate,
    # Numbers and constants.
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number(_U1)),
    b"M": lambda m: m.push(m.number(_U2)),
    b"J": lambda m: m.push(m.number(_I4)),
    b"I": lambda m: m.push(_integer_or_bool(m.line())),
    b"L": lambda m: m.push(_integer(m.line())),
    b"\x8a": lambda m: m.push_long(m.number(_U1)),
    b"\x8b": lambda m: m.push_long(m.number(_I4)),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(_F8.unpack(m.bytes_of(8))[0]),
    # Text and bytes.
    b"S": lambda m: m.push(_quoted(m.line())),
    b"V": lambda m: m.push(m.line("raw-unicode-escape")),
    b"T": lambda m: m.push_python2_text(m.number(_I4)),
    b"U": lambda m: m.push_python2_text(m.number(_U1)),
    b"X": lambda m: m.push_text(m.number(_U4)),
    b"\x8c": lambda m: m.push_text(m.number(_U1)),
    b"\x8d": lambda m: m.push_text(m.number(_U8)),
    b"B": lambda m: m.push_bytes(m.number(_U4)),
    b"C": lambda m: m.push_bytes(m.number(_U1)),
    b"\x8e": lambda m: m.push_bytes(m.number(_U8)),
    b"\x96": lambda m: m.push_bytes(m.number(_U8)),
    # Containers.
    b")": lambda m: m.push(()),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b"t": lambda m: m.push(tuple(m.pop_mark())),
    b"l": lambda m: m.push(m.pop_mark()),
    b"d": _Machine.push_dict,
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"\x8f": _Machine.new_set,
    b"\x91": _Machine.new_frozenset,
    b"a": _Machine.append,
    b"e": lambda m: m.add(m.pop_mark()),
    b"\x90": lambda m: m.add(m.pop_mark()),
    b"s": _Machine.set_pair,
    b"u": lambda m: m.set_pairs(m.pop_mark()),
    # The memo.
    b"p": lambda m: m.put(_integer(m.line())),
    b"q": lambda m: m.put(m.number(_U1)),
    b"r": lambda m: m.put(m.number(_U4)),
    b"\x94": _Machine.memoize,
    b"g": lambda m: m.get(_integer(m.line())),
    b"h": lambda m: m.get(m.number(_U1)),
    b"j": lambda m: m.get(m.number(_U4)),
    # Objects.
    b"c": lambda m: m.reference(m.line(), m.line()),
    b"\x93": _Machine.stack_global,
    b"R": _Machine.reduce,
    b"\x81": _Machine.new_object,
    b"\x92": _Machine.new_object_with_keywords,
    b"i": _Machine.new_instance,
    b"o": _Machine.new_instance_from_stack,
    b"b": _Machine.build,
    b"P": lambda m: m.persistent((m.line(),)),
    b"Q": lambda m: m.persistent(m.stack.pop()),
    # Framing says where the bytes lie, not what they mean.
    b"\x80": lambda m: m.bytes_of(1),
    b"\x95": lambda m: m.bytes_of(8),
}
