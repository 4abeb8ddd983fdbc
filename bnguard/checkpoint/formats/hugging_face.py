"""Folders as Hugging Face saves them: weights in one file or in shards, and their description."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from bnguard.checkpoint.contents import Contents
from bnguard.checkpoint.files import Patch, first_bytes
from bnguard.checkpoint.formats.base import (
    Format,
    checkpoints_in,
    copy_folder,
    listed,
    member,
    read_note,
)
from bnguard.checkpoint.formats.safetensors import Safetensors
from bnguard.checkpoint.formats.torch_legacy import TorchLegacy
from bnguard.checkpoint.formats.torch_zip import TorchZip
from bnguard.checkpoint.unpickling import damaged, mapping_of
from bnguard.errors import CheckpointError

# transformers prefers safetensors where a folder has both.
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_SHARD_FORMATS: tuple[Format, ...] = (Safetensors(), TorchZip(), TorchLegacy())
_LARGEST_INDEX_BYTES = 2**25
_DESCRIPTION = "config.json"
_SUFFIXES = (".safetensors", ".bin")


class Sharded(Format):
    """A folder with an index: ``save_pretrained`` of transformers and of diffusers."""

    name = "sharded"

    def recognises(self, path: Path) -> bool:
        """Whether the folder has an index."""
        return path.is_dir() and _index_of(path) is not None

    @contextmanager
    def open(self, path: Path) -> Iterator[Contents]:
        """Open all shards of a folder."""
        places = _weight_map(path)
        with ExitStack() as stack:
            shards = {
                shard: stack.enter_context(shard_format(shard).open(shard))
                for shard in dict.fromkeys(places.values())
            }
            tensors = {shard: mapping_of(opened.root) or {} for shard, opened in shards.items()}
            for name, shard in places.items():
                if name not in tensors[shard]:
                    raise damaged(path, f"{name} is not in {shard.name}")
            yield Contents(
                path=path,
                format=self.name,
                root={name: tensors[shard][name] for name, shard in places.items()},
                extras={
                    f"{shard.name} {name}": value
                    for shard, opened in shards.items()
                    for name, value in opened.extras.items()
                },
                provenance=read_note(path),
            )

    def copy(self, path: Path, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the folder; a shard in which something changes is copied as its format is."""

        def copy_shard(shard: Path, copy: Path, inside: Sequence[Patch]) -> None:
            shard_format(shard).copy(shard, copy, inside, provenance)

        copy_folder(path, target, patches, provenance, copy_shard)


def _index_of(folder: Path) -> Path | None:
    indices = [path for path in listed(folder) if path.name.endswith(INDEX_SUFFIXES)]
    indices.sort(key=lambda path: (path.name.endswith(INDEX_SUFFIXES[1]), path.name))
    return indices[0] if indices else None


def _weight_map(folder: Path) -> Mapping[str, Path]:
    """Return which shard has which tensor."""
    index = _index_of(folder)
    assert index is not None
    try:
        content = json.loads(first_bytes(index, _LARGEST_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        raise damaged(index, "it is no JSON") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise damaged(index, "it has no weight_map")
    return {name: member(folder, shard) for name, shard in weight_map.items()}


def shard_format(shard: Path) -> Format:
    """Return the format of a file in a folder.

    Raises:
        CheckpointError: It is missing, or of no format that such files have.
    """
    for candidate in _SHARD_FORMATS:
        if candidate.recognises(shard):
            return candidate
    state = "cannot be read as one" if shard.exists() else "is missing"
    raise CheckpointError(f"{shard}: a shard of the checkpoint {state}; copy it again")


class Pretrained(Format):
    """A folder with a configuration and one file of weights, as ``save_pretrained`` writes it."""

    name = "pretrained"

    def recognises(self, path: Path) -> bool:
        """Whether the folder has a configuration, and one file of weights only."""
        if not (path / _DESCRIPTION).is_file():
            return False
        files = checkpoints_in(path)
        return len(files) == 1 and files[0].suffix in _SUFFIXES

    @contextmanager
    def open(self, path: Path) -> Iterator[Contents]:
        """Open the file of weights."""
        weights = weights_in(path)
        with shard_format(weights).open(weights) as contents:
            note = read_note(path) or contents.provenance
            yield replace(contents, path=path, format=self.name, provenance=note)

    def copy(self, path: Path, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the folder; the file of weights is copied as its format is."""

        def copy_weights(weights: Path, copy: Path, inside: Sequence[Patch]) -> None:
            shard_format(weights).copy(weights, copy, inside, provenance)

        copy_folder(path, target, patches, provenance, copy_weights)


def weights_in(folder: Path) -> Path:
    """Return the file of weights in a folder of this format."""
    (weights,) = checkpoints_in(folder)
    return weights
