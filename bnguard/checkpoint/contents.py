"""All values in an open checkpoint, each with the keys that lead to it."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bnguard.checkpoint.formats import OpenCheckpoint
from bnguard.checkpoint.storage import NUMPY_TYPES, Source, Storage, StoredTensor
from bnguard.checkpoint.unpickling import ATOMS, Blob, InertObject, Reference, as_sizes, mapping_of
from bnguard.errors import CheckpointError

# A file of a few bytes can describe a tree without end, by naming one branch in many places.
_MOST_ENTRIES = 1_500_000
# This many plain values of a list, the order of a data set perhaps, count as one entry.
_ATOMS_PER_ENTRY = 16
_MOST_NESTED = 200
# One text in a pickle may hold the bytes of many arrays; larger ones stay in the file.
_LARGEST_ARRAY_IN_MEMORY = 2**16
_MOST_ARRAY_BYTES = 2**28

_ATOM_TYPES = frozenset(ATOMS)

# A pickled module keeps its tensors and its children in these, which no key of its state dict
# mentions. Tensors anywhere else in it are in no state dict.
_TRANSPARENT = ("_parameters", "_buffers", "_modules")


class Entry(NamedTuple):
    """A value in a checkpoint: a tensor, an atom, or a list of atoms.

    Attributes:
        path: The keys that lead to it from the root.
        home: How many of these keys lead to the model that it belongs to.
        value: The value.
        owner: The pickled module that it is a part of; None in a state dict.
    """

    path: tuple[str, ...]
    home: int
    value: object
    owner: InertObject | None = None

    @property
    def key(self) -> str:
        """The path as one dotted name."""
        return ".".join(self.path)

    @property
    def prefix(self) -> str:
        """The part of ``key`` that is not in the model's own state dict."""
        return "".join(f"{part}." for part in self.path[: self.home])

    def key_in(self, prefix: str) -> str | None:
        """Return the key in the state dict of a model or a part of it; None outside of it.

        >>> Entry(("state_dict", "encoder_q.bn.weight"), 1, None).key_in("state_dict.encoder_q.")
        'bn.weight'
        """
        is_inside = prefix.startswith(self.prefix) and self.key.startswith(prefix)
        return self.key.removeprefix(prefix) if is_inside else None


def entries(checkpoint: OpenCheckpoint) -> Iterator[Entry]:
    """Yield all values of a checkpoint, in the order in which they were saved.

    Branches may be shared; one that contains itself is followed once.
    """
    count, array_bytes = 0, 0
    branches = [(0, iter([_Node((), None, checkpoint.root, None)]))]
    above: set[int] = set()
    while branches:
        identity, siblings = branches[-1]
        node = next(siblings, None)
        if node is None:
            above.discard(identity)
            branches.pop()
            continue
        if isinstance(node.value, InertObject):
            array = _array_as_tensor(node.value)
            if array is not None:
                node = node._replace(value=array)
                array_bytes += min(array.pieces[0].storage.nbytes, _LARGEST_ARRAY_IN_MEMORY)
            if array_bytes > _MOST_ARRAY_BYTES:
                raise _too_much(checkpoint.path, "holds too many NumPy arrays")
        children = _children(node.value)
        atoms = len(node.value) if children is None and isinstance(node.value, (list, tuple)) else 0
        count += 1 + atoms // _ATOMS_PER_ENTRY
        if count > _MOST_ENTRIES:
            raise _too_much(checkpoint.path, f"holds more than {_MOST_ENTRIES:,} values")
        if children is None:
            home = _home(node.path) if node.module_at is None else node.module_at
            yield Entry(node.path, home, node.value, node.owner)
        elif id(node.value) not in above:
            if len(branches) > _MOST_NESTED:
                raise _too_much(checkpoint.path, f"is nested more than {_MOST_NESTED} levels deep")
            above.add(id(node.value))
            branches.append((id(node.value), _below(node, children)))


class _Node(NamedTuple):
    """A value on the way through a checkpoint."""

    path: tuple[str, ...]
    module_at: int | None  # how many of the keys lead to the outermost pickled module around it
    value: object
    owner: InertObject | None  # the innermost pickled module around it


def _below(node: _Node, children: Iterator[tuple[str, object]]) -> Iterator[_Node]:
    module_at, owner = node.module_at, node.owner
    if isinstance(node.value, InertObject) and _is_module(node.value):
        module_at = len(node.path) if module_at is None else module_at
        owner = node.value
    return (_Node((*node.path, name), module_at, child, owner) for name, child in children)


def _too_much(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}, more than bnguard reads; save the state dict alone")


def _children(node: object) -> Iterator[tuple[str, object]] | None:
    """Return what a node contains, by name; None for a leaf."""
    if isinstance(node, dict) and node:
        return ((_name(key), value) for key, value in node.items())
    if isinstance(node, (list, tuple)) and not _ATOM_TYPES.issuperset(map(type, node)):
        return ((str(index), value) for index, value in enumerate(node))
    if isinstance(node, InertObject):
        return _children_of_object(node)
    return None


def _children_of_object(node: InertObject) -> Iterator[tuple[str, object]]:
    state = node.state if isinstance(node.state, dict) else {}
    if "_modules" in state:
        yield from _children_of_module(state)
        yield "<class>", node.class_name
        return
    for name, value in state.items():
        yield _name(name), value
    for key, value in (node.pairs or {}).items():
        yield _name(key), value
    for index, value in enumerate(node.items or ()):
        yield str(index), value
    yield "<class>", node.class_name
    if node.args:
        yield "<arguments>", node.args
    if node.state is not None and not state:
        yield "<state>", node.state


def _children_of_module(state: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    """Yield what a module's state dict would hold, and its options: numbers, names and flags."""
    passing = _members(state.get("_non_persistent_buffers_set"))
    for group in _TRANSPARENT:
        for key, value in (mapping_of(state.get(group)) or {}).items():
            if value is not None and not (group == "_buffers" and key in passing):
                yield _name(key), value
    for name, value in state.items():
        if type(value) in _ATOM_TYPES and not _name(name).startswith("_"):
            yield _name(name), value


def _members(stored: object) -> frozenset[str]:
    """Return the names in a set, which old protocols build from a list and new ones add to."""
    if not isinstance(stored, InertObject):
        return frozenset()
    listed = next(iter(stored.args), ()) if isinstance(stored.args, (list, tuple)) else ()
    names = [*(listed if isinstance(listed, (list, tuple)) else ()), *(stored.items or ())]
    return frozenset(name for name in names if isinstance(name, str))


def _name(key: object) -> str:
    if isinstance(key, InertObject):
        return f"<{key.class_name}>"
    return key if isinstance(key, str) else str(key)


def _is_module(node: InertObject) -> bool:
    """Return whether an object is a pickled module, or one of TorchScript."""
    if not isinstance(node.state, dict):
        return False
    is_script = isinstance(node.made_by, Reference) and node.made_by.module.startswith("__torch__")
    return is_script or "_modules" in node.state


def _home(path: tuple[str, ...]) -> int:
    """Return how many parts of a path lead to the state dict that holds its last part.

    The keys of a state dict are dotted names. If the last part is a bare one, the dictionaries
    are the modules, and only the first of several can be the name of the model.
    """
    if path and "." in path[-1]:
        return len(path) - 1
    return 1 if len(path) > 2 else 0


# By their codes in a pickle: float32 is f4.
_NUMPY_DTYPES = {np.dtype(name).str[1:]: name for name in NUMPY_TYPES}


def _array_as_tensor(made: InertObject) -> StoredTensor | None:
    """Return a pickled NumPy array or scalar of numbers as a tensor; None for anything else.

    Only arrays in C order with their bytes in the pickle are read.
    """
    function = made.made_by
    if not isinstance(function, Reference):
        return None
    if not function.module.startswith(("numpy.core.", "numpy._core.")):
        return None
    match function.name, made.args, made.state:
        case "_reconstruct", _, (_, shape, dtype, False, data):
            pass
        case "scalar", (dtype, data), _:
            shape = ()
        case "_frombuffer", (data, dtype, shape, "C"), _:
            pass
        case _:
            return None
    match dtype:
        case InertObject(
            Reference("numpy", "dtype"), (str(code), *_), (_, "<" | ">" | "|" | "=" as order, *_)
        ) if code in _NUMPY_DTYPES:
            content = _bytes_of_array(data)
        case _:
            return None
    try:
        sizes = as_sizes(shape)
    except ValueError:
        return None
    if content is None or math.prod(sizes) * np.dtype(code).itemsize != content.size:
        return None
    byteorder = "big" if order == ">" else "little"
    storage = Storage(content.size, byteorder, lambda: content, is_replaceable=False)
    return StoredTensor.viewing(storage, _NUMPY_DTYPES[code], sizes)


def _bytes_of_array(data: object) -> Source | None:
    """Return the bytes of an array; before protocol 3 they are text, a character each."""
    match data:
        case Blob(place):
            return place
        case InertObject(Reference("_codecs", "encode"), (str(text), "latin1" | "latin-1")):
            if not text.isascii() and max(text) > "\xff":
                return None
            data = text.encode("latin-1")
    return Source(Path(), io.BytesIO(data), 0, len(data)) if isinstance(data, bytes) else None
