"""torch's distributed checkpoints: a folder of ``.distcp`` files and a pickle that describes them.

torch loads that pickle without restriction; here it goes through the same inert machine as all
others. Each tensor, or block of one, is a small archive of its own in a ``.distcp`` file, opened
when it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bnguard.checkpoint.contents import Contents
from bnguard.checkpoint.files import Patch, Source, open_source, patched, write_all
from bnguard.checkpoint.formats.base import Format, copy_folder, member, read_note
from bnguard.checkpoint.formats.torch_zip import (
    TorchZip,
    archive_folder,
    checksum_patches,
    read_archive,
    read_object,
)
from bnguard.checkpoint.stored_tensors import Piece, StoredTensor
from bnguard.checkpoint.unpickling import InertObject, Reference, damaged, mapping_of, read_pickle
from bnguard.errors import CheckpointError

METADATA = ".metadata"
# Lightning keeps beside it what it does not distribute: epoch, step, hyper-parameters.
_LIGHTNING_METADATA = "meta.pt"

_Offsets = tuple[int, ...]


@dataclass(frozen=True)
class _Place:
    """Where an archive lies.

    Attributes:
        path: The file.
        offset: First byte.
        size: Number of bytes.
    """

    path: Path
    offset: int
    size: int


@dataclass(frozen=True, eq=False)
class _Description:
    """What the metadata say.

    Attributes:
        values: What describes each entry, by its flat name.
        places: Where each entry lies: by flat name, and by the corner of a block of a tensor.
        paths: The keys that led to each entry before its name was flattened.
    """

    values: Mapping[str, InertObject]
    places: Mapping[tuple[str, _Offsets | None], _Place]
    paths: Mapping[str, tuple[object, ...]]


@dataclass(frozen=True, eq=False)
class _Files:
    """The files of the folder, opened when they are needed."""

    stack: ExitStack
    opened: dict[Path, Source] = field(default_factory=dict)

    def at(self, place: _Place) -> Source:
        if place.path not in self.opened:
            self.opened[place.path] = self.stack.enter_context(open_source(place.path))
        return self.opened[place.path].window(place.offset, place.size)


class Distributed(Format):
    """``torch.distributed.checkpoint.save``, and Lightning's sharded checkpoints."""

    name = "torch distributed"

    def recognises(self, path: Path) -> bool:
        """Whether the folder has the metadata of a distributed checkpoint."""
        return path.is_dir() and (path / METADATA).is_file()

    @contextmanager
    def open(self, path: Path) -> Iterator[Contents]:
        """Open a folder of this format."""
        description = _describe(path)
        with ExitStack() as stack:
            root = _root(path, description, _Files(stack))
            beside = path / _LIGHTNING_METADATA
            if beside.is_file():
                opened = stack.enter_context(TorchZip().open(beside))
                root = {**(mapping_of(opened.root) or {}), **root}
            yield Contents(path=path, format=self.name, root=root, provenance=read_note(path))

    def copy(self, path: Path, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the folder, with new checksums in the archives that change."""
        places = set(_describe(path).places.values())

        def copy_file(file: Path, copy: Path, inside: Sequence[Patch]) -> None:
            if file.name == _LIGHTNING_METADATA:
                TorchZip().copy(file, copy, inside, provenance)
                return
            with open_source(file) as source, copy.open("wb") as handle:
                changes = list(inside)
                for place in places:
                    if place.path == file and any(_is_in(place, patch) for patch in inside):
                        archive = read_archive(source.window(place.offset, place.size))
                        changes += checksum_patches(archive, inside)
                write_all(handle, patched(source, changes))

        copy_folder(path, target, patches, provenance, copy_file)


def _is_in(place: _Place, patch: Patch) -> bool:
    return place.offset <= patch.position < place.offset + place.size


def _describe(folder: Path) -> _Description:
    """Read the metadata of a folder."""
    path = folder / METADATA
    with open_source(path) as source:
        metadata = read_pickle(source, source.stream(), _no_storage)
    try:
        fields = _fields(metadata)
        return _Description(
            {str(name): _object(value) for name, value in _pairs(fields["state_dict_metadata"])},
            dict(_places(folder, fields["storage_data"])),
            {str(name): _tuple(keys) for name, keys in _pairs(fields.get("planner_data") or {})},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"unexpected metadata: {error}") from error


def _places(
    folder: Path, storage_data: object
) -> Iterator[tuple[tuple[str, _Offsets | None], _Place]]:
    for index, info in _pairs(storage_data):
        where, what = _fields(info), _fields(index)
        if where.get("transform_descriptors"):
            raise CheckpointError(
                f"{folder}: its tensors are stored transformed (compressed, perhaps), which "
                "bnguard cannot read; save it without extensions"
            )
        corner = what.get("offset")
        key = str(what["fqn"]), None if corner is None else _sizes(corner)
        offset, size = _sizes((where["offset"], where["length"]))
        yield key, _Place(member(folder, where["relative_path"]), offset, size)


def _root(folder: Path, description: _Description, files: _Files) -> dict[object, object]:
    """Return the dictionary that was saved, with the nesting that it had."""
    root: dict[object, object] = {}
    for name, value in description.values.items():
        try:
            if value.class_name.endswith(".TensorStorageMetadata"):
                stored: object = _tensor(folder, name, _fields(value), description, files)
            else:
                stored = _read_archived(files.at(description.places[name, None]))
            _place(root, description.paths.get(name) or (name,), name, stored)
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(folder / METADATA, f"unexpected metadata of {name}: {error}") from error
    return root


def _place(root: dict[object, object], keys: tuple[object, ...], name: str, value: object) -> None:
    parent: object = root
    for key in keys[:-1]:
        parent = parent.setdefault(key, {}) if isinstance(parent, dict) else None
    if isinstance(parent, dict):
        parent[keys[-1]] = value
    else:
        root[name] = value


def _tensor(
    folder: Path,
    name: str,
    fields: Mapping[str, object],
    description: _Description,
    files: _Files,
) -> StoredTensor:
    dtype = _tuple(_object(fields["properties"]).state)[0]
    if not isinstance(dtype, Reference):
        raise ValueError("a tensor without a type")
    shape = _sizes(fields["size"])
    blocks = []
    for chunk in _list(fields["chunks"]):
        block = _fields(chunk)
        corner, sizes = _sizes(block["offsets"]), _sizes(block["sizes"])
        if any(c + s > n for c, s, n in zip(corner, sizes, shape, strict=True)):
            raise ValueError("a block outside its tensor")
        blocks.append((corner, sizes, description.places[name, corner]))
    if sum(math.prod(sizes) for _, sizes, _ in blocks) != math.prod(shape):
        raise ValueError("blocks that do not cover their tensor")

    def find_pieces() -> tuple[Piece, ...]:
        return tuple(_piece(folder, name, dtype.name, block, files) for block in blocks)

    return StoredTensor(dtype.name, shape, find_pieces)


def _piece(
    folder: Path, name: str, dtype: str, block: tuple[_Offsets, _Offsets, _Place], files: _Files
) -> Piece:
    corner, sizes, place = block
    stored = _read_archived(files.at(place))
    if not isinstance(stored, StoredTensor) or (stored.dtype, stored.shape) != (dtype, sizes):
        raise damaged(folder, f"{name} is not what its metadata say")
    (piece,) = stored.pieces
    return Piece(piece.storage, piece.start, piece.shape, piece.stride, corner)


def _read_archived(source: Source) -> object:
    archive = read_archive(source)
    return read_object(archive, archive_folder(archive))


def _no_storage(identifier: tuple[object, ...]) -> object:
    raise ValueError("a storage in the metadata")


# What a hostile pickle may have put in place of what is expected is refused by these.


def _fields(value: object) -> Mapping[str, object]:
    return {str(name): field for name, field in _pairs(_object(value).state)}


def _object(value: object) -> InertObject:
    if not isinstance(value, InertObject):
        raise TypeError("no object")
    return value


def _pairs(value: object) -> ItemsView[object, object]:
    mapping = mapping_of(value)
    if mapping is None:
        raise TypeError("no dictionary")
    return mapping.items()


def _tuple(value: object) -> tuple[object, ...]:
    if not isinstance(value, tuple):
        raise TypeError("no tuple")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("no list")
    return value


def _sizes(value: object) -> _Offsets:
    sizes = tuple(size for size in _tuple(value) if type(size) is int and size >= 0)
    if len(sizes) != len(_tuple(value)):
        raise ValueError("no sizes")
    return sizes
