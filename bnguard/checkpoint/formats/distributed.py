"""torch's distributed checkpoints: a folder of ``.distcp`` files and a pickle that describes them.

torch loads that pickle without restriction; here the inert machine reads it, like all others. Each
tensor, or block of one, is a small archive of its own in a ``.distcp`` file, opened when it is
asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bnguard.checkpoint.formats import OpenFolder, member
from bnguard.checkpoint.formats.torch_zip import Archive, TorchZip
from bnguard.checkpoint.storage import OpenFiles, Patch, Piece, Source, StoredTensor
from bnguard.checkpoint.unpickling import Reference, as_sizes, damaged, mapping_of, read_pickle
from bnguard.errors import CheckpointError

METADATA = ".metadata"
# Lightning keeps in it what it does not distribute: epoch, step, hyper-parameters.
_LIGHTNING_METADATA = "meta.pt"
# What a hostile or damaged pickle has in place of the expected types raises these.
_UNEXPECTED = (AttributeError, LookupError, TypeError, ValueError)

_Offsets = tuple[int, ...]


class _Place(NamedTuple):
    """Where an archive is: the file, the first byte in it, and the number of bytes."""

    path: Path
    offset: int
    size: int


class Distributed(OpenFolder):
    """``torch.distributed.checkpoint.save``, and Lightning's sharded checkpoints."""

    format = "torch distributed"

    def __init__(self, path: Path, files: OpenFiles) -> None:
        super().__init__(path, files)
        metadata = path / METADATA
        source = self.open_file(metadata)
        described: Any = read_pickle(source, source.stream())
        try:
            fields = _fields(described)
            # By the flat name of the entry, and by the corner of a block of a tensor.
            self._places: dict[tuple[str, _Offsets | None], _Place] = {}
            for index, info in _pairs(fields["storage_data"]).items():
                self._add_place(_fields(index), _fields(info))
            # The keys that led to each entry before its name was flattened.
            paths = _pairs(fields.get("planner_data") or {})
            if not all(isinstance(keys, tuple) for keys in paths.values()):
                raise TypeError("keys that are not a tuple")
            root: dict[object, object] = {}
            for name, value in _pairs(fields["state_dict_metadata"]).items():
                _put(root, paths.get(name) or (name,), name, self._read_entry(name, value))
        except _UNEXPECTED as error:
            raise damaged(metadata, f"unexpected metadata: {error}") from error
        self._lightning = path / _LIGHTNING_METADATA
        if self._lightning.is_file():
            self._of_lightning = TorchZip(self._lightning, files)
            root = {**(mapping_of(self._of_lightning.root) or {}), **root}
        self.root = root

    @classmethod
    def recognises(cls, path: Path, start: bytes) -> bool:
        """Return whether a folder has the metadata of a distributed checkpoint."""
        return path.is_dir() and (path / METADATA).is_file()

    def copy_file(self, path: Path, copy: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy a file, with new checksums in the archives that change."""
        if path == self._lightning:
            self._of_lightning.copy(copy, patches, provenance)
            return
        changes = list(patches)
        for place in set(self._places.values()):
            reach = range(place.offset, place.offset + place.size)
            if place.path == path and any(patch.position in reach for patch in patches):
                changes += Archive.read(self._source(place)).checksum_patches(patches)
        with copy.open("wb") as handle:
            handle.writelines(self.open_file(path).patched(changes))

    def _add_place(self, index: dict[Any, Any], info: dict[Any, Any]) -> None:
        if info.get("transform_descriptors"):
            raise CheckpointError(
                f"{self.path}: its tensors are stored transformed (compressed, perhaps), which "
                "bnguard cannot read; save it without extensions"
            )
        corner = index.get("offset")
        key = str(index["fqn"]), None if corner is None else as_sizes(corner)
        offset, size = as_sizes((info["offset"], info["length"]))
        self._places[key] = _Place(member(self.path, info["relative_path"]), offset, size)

    def _read_entry(self, name: str, value: Any) -> object:
        """Return the entry that the metadata describe."""
        if not value.class_name.endswith(".TensorStorageMetadata"):
            return Archive.read(self._source(self._places[name, None])).read_object()
        fields = _fields(value)
        dtype, shape = value.state["properties"].state[0], as_sizes(fields["size"])
        if not isinstance(dtype, Reference):
            raise ValueError("a tensor without a type")
        blocks = []
        for chunk in fields["chunks"]:
            block = _fields(chunk)
            corner, sizes = as_sizes(block["offsets"]), as_sizes(block["sizes"])
            if any(c + s > n for c, s, n in zip(corner, sizes, shape, strict=True)):
                raise ValueError("a block outside its tensor")
            blocks.append((corner, sizes, self._places[name, corner]))
        if sum(math.prod(sizes) for _, sizes, _ in blocks) != math.prod(shape):
            raise ValueError("blocks that do not cover their tensor")
        return StoredTensor(
            dtype.name,
            shape,
            lambda: tuple(self._piece(name, dtype.name, *block) for block in blocks),
        )

    def _piece(
        self, name: str, dtype: str, corner: _Offsets, sizes: _Offsets, place: _Place
    ) -> Piece:
        stored = Archive.read(self._source(place)).read_object()
        if not isinstance(stored, StoredTensor) or (stored.dtype, stored.shape) != (dtype, sizes):
            raise damaged(self.path, f"{name} does not match its metadata")
        (piece,) = stored.pieces
        return Piece(piece.storage, piece.start, piece.shape, piece.stride, corner)

    def _source(self, place: _Place) -> Source:
        """Return the bytes of an archive."""
        return self.open_file(place.path).window(place.offset, place.size)


def _put(root: dict[object, object], keys: Sequence[object], name: str, value: object) -> None:
    """Put a value at the place in the nested dictionaries that it had before it was saved."""
    parent: object = root
    for key in keys[:-1]:
        parent = parent.setdefault(key, {}) if isinstance(parent, dict) else None
    if isinstance(parent, dict):
        parent[keys[-1]] = value
    else:
        root[name] = value


def _fields(value: Any) -> dict[Any, Any]:
    """Return the attributes of an object that the metadata describe."""
    return _pairs(value.state)


def _pairs(value: object) -> dict[Any, Any]:
    pairs = mapping_of(value)
    if pairs is None:
        raise TypeError("not a dictionary")
    return pairs
