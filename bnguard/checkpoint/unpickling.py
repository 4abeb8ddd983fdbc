"""A pickle machine that executes nothing: it runs the opcodes, never what they ask for.

Python's own unpickler leaves doors open even if the classes that it finds are restricted: a cache
of extension codes, state set on whatever is on the stack, a memo as large as a number in the file.
This one knows lists, tuples, dictionaries, text, numbers, and inert placeholders for all other
objects. It is not recursive, and its memory is bounded.
"""

from __future__ import annotations

import io
import pickletools
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from bnguard.checkpoint.storage import CARRIERS, Source, Storage, StoredTensor, carrier
from bnguard.errors import CheckpointError, printable

# What a plain value may consist of besides lists, tuples and dictionaries.
ATOMS = (type(None), bool, int, float, complex, str, bytes)

# Each opcode keeps at most some 100 bytes; a checkpoint has some 50 per tensor.
_MOST_OPCODES = 10_000_000
# A longer text stays in the file, as do all others once those in memory are this long together.
_LONGEST_TEXT_BYTES = 2**16
_MOST_TEXT_BYTES = 2**27
_LONGEST_INTEGER_BYTES = 1024
_MOST_DIMENSIONS = 64
_LARGEST_SIZE = 2**60
_MOST_NESTED = 64
_MOST_PLAIN_VALUES = 1_000_000

# The classes of torch's typed storages, whose names imply the type of the elements.
_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}

# The functions by which torch pickles a tensor.
_REBUILD = "torch._utils._rebuild_tensor"


@dataclass(frozen=True, slots=True)
class Reference:
    """The name of a class or function in a pickle; it is never imported.

    >>> str(Reference("os", "system"))
    'os.system'
    """

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False, slots=True)
class InertObject:
    """An object that a pickle describes, and that nobody creates.

    It would have been made by calling ``made_by``, a :class:`Reference` or another inert object,
    with ``args``; would have received ``state``; and ``items`` would have been appended or added to
    it, ``pairs`` set by key. The last two are None if there are none.
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
            match made_by:
                # copyreg gets the class as its first argument.
                case InertObject(Reference("copyreg" | "copy_reg"), (made_by, *_)):
                    pass
                case InertObject(made_by):
                    pass
                case _:
                    break
        return str(made_by) if isinstance(made_by, Reference) else "an unnamed object"

    # A generated one would follow whatever the object refers to, without end.
    def __repr__(self) -> str:
        return f"<{self.class_name}>"


@dataclass(frozen=True, eq=False)
class Blob:
    """A text or byte string that is too long for the memory, and stays in the file."""

    place: Source


@dataclass(frozen=True, eq=False)
class TypedStorage:
    """A storage and the element type that its class implies; None if that is untyped."""

    storage: Storage
    dtype: str | None


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


class NotPlainError(Exception):
    """A value that contains an object of a class, or is too large to be plain data."""


def plain(value: object) -> object:
    """Return a value as atoms, lists, tuples and dictionaries; paths become strings.

    An object of another class in it raises :class:`NotPlainError`, which names the class.

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
    if isinstance(value, Reference):
        if value.module == "torch":
            return str(value)
        raise NotPlainError(str(value))
    if isinstance(value, InertObject) and value.class_name.startswith("pathlib."):
        parts = value.args if isinstance(value.args, (list, tuple)) else ()
        return str(PurePosixPath(*map(str, each(parts))))
    mapping = mapping_of(value)
    if mapping is None:
        raise NotPlainError(
            value.class_name if isinstance(value, InertObject) else type(value).__name__
        )
    keys = [key if isinstance(key, ATOMS) else str(key) for key in mapping]
    return dict(zip(keys, each(mapping.values()), strict=True))


def call(made_by: object, args: object) -> object:
    """Return the result of a call in a pickle: a tensor, a container, or an inert object.

    A tensor that makes no sense raises ``ValueError``.
    """
    match str(made_by) if isinstance(made_by, Reference) else None, args:
        case (
            "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2",
            (TypedStorage(storage, str(dtype)), start, shape, stride, *_),
        ):
            return _view(storage, dtype, start, shape, stride)
        case (
            "torch._utils._rebuild_tensor_v3",
            (TypedStorage(storage), start, shape, stride, _, _, Reference(name=dtype), *_),
        ):
            return _view(storage, dtype, start, shape, stride)
        case (
            "torch._utils._rebuild_meta_tensor_no_storage",
            (Reference(name=dtype), shape, *_),
        ) if dtype in CARRIERS:
            return StoredTensor(dtype, as_sizes(shape), tuple)
        case (
            "torch._utils._rebuild_parameter"
            | "torch._utils._rebuild_parameter_with_state"
            | "torch._utils._rebuild_device_tensor_from_cpu_tensor",
            (data, *_),
        ):
            return data
        case (
            "torch._tensor._rebuild_from_type" | "torch._tensor._rebuild_from_type_v2",
            (function, cls, arguments, state),
        ):
            # A tensor of a class of its own, or with attributes, is read as a plain one.
            if str(function).startswith(_REBUILD):
                return call(function, arguments)
            return InertObject(cls, (function, arguments), state)
        case "torch.Size", tuple(sizes):
            return as_sizes(sizes[0]) if sizes else ()
        case "collections.OrderedDict", tuple(given):
            pairs: Any = given[0] if given and isinstance(given[0], (list, tuple)) else ()
            return InertObject(made_by, pairs={as_key(key): value for key, value in pairs})
        case str(name), (InertObject(), *_) if name.startswith(_REBUILD):
            pass  # pickled without torch.save
        case str(name), _ if name.startswith(_REBUILD):
            raise ValueError("a tensor without a storage or a type")
    return InertObject(made_by, args)


def _view(
    storage: Storage, dtype: str, start: object, shape: object, stride: object
) -> StoredTensor:
    sizes, steps, (first,) = as_sizes(shape), as_sizes(stride), as_sizes((start,))
    if len(sizes) != len(steps):
        raise ValueError("a tensor without a stride for each dimension")
    return StoredTensor.viewing(storage, dtype, sizes, first, steps)


def as_sizes(values: object) -> tuple[int, ...]:
    """Return a shape, a stride or a position; raise ``ValueError`` for anything else."""
    if not isinstance(values, (tuple, list)) or len(values) > _MOST_DIMENSIONS:
        raise ValueError("not a shape")
    if not all(type(value) is int and 0 <= value < _LARGEST_SIZE for value in values):
        raise ValueError("not a shape")
    return tuple(values)


def as_key(key: object) -> object:
    """Return what can be the key of a dictionary, without hashing anything deep.

    The hash of a tuple visits all it contains, which a few bytes of pickle can make endless.
    """
    if isinstance(key, (*ATOMS, Reference, InertObject, Blob)):
        return key
    if isinstance(key, tuple) and len(key) < 16 and all(isinstance(k, ATOMS) for k in key):
        return key
    return InertObject(Reference("builtins", type(key).__name__), (key,))


def _no_storage(name: str, nbytes: int) -> Storage:
    raise ValueError("a storage that no file holds")


def read_pickle(
    source: Source, stream: BinaryIO, find_storage: Callable[[str, int], Storage] = _no_storage
) -> object:
    """Read one pickle from the position of a stream of ``source``, which ends up behind it.

    ``find_storage`` returns the storage of a name, with as many bytes as the pickle says.
    """
    try:
        return _Machine(source, stream, find_storage).run()
    except (LookupError, TypeError, ValueError, OverflowError, struct.error) as error:
        raise damaged(source.path, str(error)) from error


def damaged(path: Path, detail: str) -> CheckpointError:
    """Return the error for a file whose content makes no sense."""
    # A detail may quote the file; a short piece of it is enough.
    return CheckpointError(f"{path}: damaged, or not a checkpoint ({printable(detail[:80])})")


class _Machine:
    """The stack, the marks and the memo of a pickle that is being read."""

    def __init__(
        self, source: Source, stream: BinaryIO, find_storage: Callable[[str, int], Storage]
    ) -> None:
        self.source = source
        self.stream = stream
        self.find_storage = find_storage
        self.stack: list[object] = []
        self.below_marks: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.text_bytes = 0

    def run(self) -> object:
        for _ in range(_MOST_OPCODES):
            code = self.stream.read(1)
            opcode = _OPCODES.get(code)
            if opcode is None:
                raise ValueError(f"opcode {code!r}") if code else self.source.truncated()
            name, argument = opcode.name, self.argument(opcode)
            if name in _PUSHES:
                self.stack.append(argument)
            elif name in _RESULTS:
                count, make = _RESULTS[name]
                result = make(*self.take(count))
                self.stack.append(result)
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                self.memo[argument] = self.stack[-1]
            elif name == "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                self.stack.append(self.memo[argument])
            elif name == "MARK":
                self.below_marks.append(self.stack)
                self.stack = []
            elif name == "BINPERSID":
                self.stack.append(self.persistent(self.stack.pop()))
            elif name == "INST":
                args = self.take(_MARKED)
                self.stack.append(InertObject(argument, tuple(args)))
            elif name == "DUP":
                self.stack.append(self.stack[-1])
            elif name in ("POP", "POP_MARK"):
                self.take(1 if self.stack and name == "POP" else _MARKED)
            elif name == "STOP":
                return self.stack.pop()
            # Framing says where the bytes are, not what they mean.
            elif name not in ("PROTO", "FRAME"):
                raise ValueError("an opcode that no checkpoint has")
        raise CheckpointError(
            f"{self.source.path}: its pickle has more than {_MOST_OPCODES:,} opcodes, more than "
            "bnguard reads; save the state dict alone"
        )

    def take(self, count: int) -> list[object]:
        """Remove values from the stack, that many or all above the last mark, and return them."""
        if count > len(self.stack):
            raise IndexError("an empty stack")
        if count >= 0:
            taken = self.stack[len(self.stack) - count :]
            del self.stack[len(self.stack) - count :]
            return taken
        taken, self.stack = self.stack, self.below_marks.pop()
        return [self.stack.pop(), *taken] if count == _MARKED_AND_BELOW else taken

    def persistent(self, identifier: object) -> object:
        """Return what torch keeps outside of the pickle."""
        match identifier:
            case "module", cls, *_:
                return cls  # saved with its source code
            case "storage", Reference(name=kind), str(name), _, int(count), *view if count >= 0:
                if view not in ([], [None]):
                    raise ValueError("a storage that views another one")
                dtype = _STORAGE_DTYPES.get(kind)
                nbytes = count * carrier(dtype or "uint8").itemsize
                return TypedStorage(self.find_storage(name, nbytes), dtype)
        raise ValueError("a persistent identifier that is not a storage")

    def argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        """Read what follows an opcode; a text that is too long stays in the file."""
        kind, name = opcode.arg, opcode.name
        if kind is None:
            return None
        # pickletools reads these as Python 3 writes them: Python 2 wrote any encoding, any escape.
        if name in ("GLOBAL", "INST"):
            return Reference(self.line(), self.line())
        if name == "STRING":
            return _unquote(self.line())
        if kind.n not in _SIZE_BYTES or name in ("LONG1", "LONG4"):
            value = kind.reader(self.stream)
            if isinstance(value, int) and value.bit_length() > 8 * _LONGEST_INTEGER_BYTES:
                raise ValueError("an integer that is too long")
            return value
        size = int.from_bytes(self.read(_SIZE_BYTES[kind.n]), "little")
        if size > _LONGEST_TEXT_BYTES or self.text_bytes + size > _MOST_TEXT_BYTES:
            blob = Blob(self.source.window(self.stream.tell(), size))
            self.stream.seek(size, io.SEEK_CUR)
            return blob
        self.text_bytes += size
        data = self.read(size)
        if "BYTE" in name:
            return data
        return data.decode("utf-8", "surrogatepass" if "UNICODE" in name else "replace")

    def read(self, size: int) -> bytes:
        data = self.stream.read(size)
        if len(data) < size:
            raise self.source.truncated()
        return data

    def line(self) -> str:
        line = self.stream.readline()
        if not line.endswith(b"\n"):
            raise ValueError("a line that is too long")
        return line[:-1].decode("utf-8")


def _unquote(text: str) -> str:
    if len(text) < 2 or text[0] != text[-1] or text[0] not in "'\"":
        raise ValueError("a text without quotes")
    return text[1:-1]


def _reference(module: object, name: object) -> Reference:
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a name that is not text")
    return Reference(module, name)


def _add(target: object, *items: object) -> object:
    present = target
    if isinstance(target, InertObject):
        present = target.items = [] if target.items is None else target.items
    if not isinstance(present, list):
        raise TypeError("items for something that is not a list")
    present.extend(items)
    return target


def _set(target: object, *keys_and_values: object) -> object:
    pairs = target
    if isinstance(target, InertObject):
        pairs = target.pairs = {} if target.pairs is None else target.pairs
    if not isinstance(pairs, dict):
        raise TypeError("pairs for something that is not a dictionary")
    for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
        pairs[as_key(key)] = value
    return target


def _build(target: object, state: object) -> object:
    # The state of anything else, such as a tensor's attributes, is not needed.
    if isinstance(target, InertObject):
        target.state = state
    return target


_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
# How many bytes hold the length of a text, by where pickletools takes it from.
_SIZE_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
# The opcodes that put their argument on the stack.
_PUSHES = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "GLOBAL"),
    }
)
# All values above the last mark, and these with the one below the mark.
_MARKED, _MARKED_AND_BELOW = -1, -2
# The opcodes that put a result in place of some values: how many, and how it is made from them.
_RESULTS: dict[str, tuple[int, Callable[..., object]]] = {
    "NONE": (0, lambda: None),
    "NEWTRUE": (0, lambda: True),
    "NEWFALSE": (0, lambda: False),
    "EMPTY_TUPLE": (0, tuple),
    "EMPTY_LIST": (0, list),
    "EMPTY_DICT": (0, dict),
    "EMPTY_SET": (0, lambda: InertObject(Reference("builtins", "set"))),
    "TUPLE1": (1, lambda *items: items),
    "TUPLE2": (2, lambda *items: items),
    "TUPLE3": (3, lambda *items: items),
    "TUPLE": (_MARKED, lambda *items: items),
    "LIST": (_MARKED, lambda *items: [*items]),
    "DICT": (_MARKED, lambda *items: _set({}, *items)),
    "FROZENSET": (_MARKED, lambda *i: InertObject(Reference("builtins", "frozenset"), items=[*i])),
    "APPEND": (2, _add),
    "APPENDS": (_MARKED_AND_BELOW, _add),
    "ADDITEMS": (_MARKED_AND_BELOW, _add),
    "SETITEM": (3, _set),
    "SETITEMS": (_MARKED_AND_BELOW, _set),
    "STACK_GLOBAL": (2, _reference),
    "REDUCE": (2, call),
    "NEWOBJ": (2, InertObject),
    "NEWOBJ_EX": (3, lambda cls, args, keywords: InertObject(cls, (args, keywords))),
    "OBJ": (_MARKED, lambda cls, *args: InertObject(cls, args)),
    "BUILD": (2, _build),
}
