"""Folders as Hugging Face saves them: weights in one file or in shards, and their description."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from bnguard.checkpoint.formats import (
    OpenCheckpoint,
    OpenFolder,
    checkpoints_in,
    member,
    sort_folder,
)
from bnguard.checkpoint.formats.safetensors import Safetensors
from bnguard.checkpoint.formats.torch_legacy import TorchLegacy
from bnguard.checkpoint.formats.torch_zip import TorchZip
from bnguard.checkpoint.storage import OpenFiles, Patch
from bnguard.checkpoint.unpickling import damaged, mapping_of
from bnguard.errors import CheckpointError

# transformers prefers safetensors in a folder that has both.
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
_SHARD_FORMATS: tuple[type[OpenCheckpoint], ...] = (Safetensors, TorchZip, TorchLegacy)
_LARGEST_INDEX_BYTES = 2**25
_DESCRIPTION = "config.json"
_SUFFIXES = (".safetensors", ".bin")


class _OpenShards(OpenFolder):
    """A folder whose files of weights are checkpoints of their own."""

    def __init__(self, path: Path, files: OpenFiles) -> None:
        super().__init__(path, files)
        self.shards: dict[Path, OpenCheckpoint] = {}

    def open_shard(self, shard: Path) -> OpenCheckpoint:
        """Open a file of weights, once."""
        if shard not in self.shards:
            start = self.files.first_bytes(shard, 64)
            fitting = [each for each in _SHARD_FORMATS if each.recognises(shard, start)]
            if not fitting:
                state = "cannot be read as one" if shard.exists() else "is missing"
                raise CheckpointError(f"{shard}: a shard of the checkpoint {state}; copy it again")
            self.shards[shard] = fitting[0](shard, self.files)
        return self.shards[shard]

    def copy_file(self, path: Path, copy: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy a shard as its format does."""
        self.shards[path].copy(copy, patches, provenance)


class Sharded(_OpenShards):
    """A folder with an index: ``save_pretrained`` of transformers and of diffusers."""

    format = "sharded"

    def __init__(self, path: Path, files: OpenFiles) -> None:
        super().__init__(path, files)
        root = {}
        for name, shard in _weight_map(path, files).items():
            tensors = mapping_of(self.open_shard(shard).root) or {}
            if name not in tensors:
                raise damaged(path, f"{name} is not in {shard.name}")
            root[name] = tensors[name]
        self.root = root
        self.extras = {
            f"{shard.name} {name}": value
            for shard, opened in self.shards.items()
            for name, value in opened.extras.items()
        }

    @classmethod
    def recognises(cls, path: Path, start: bytes) -> bool:
        """Return whether a folder has an index."""
        return path.is_dir() and _find_index(path) is not None


class Pretrained(_OpenShards):
    """A folder with a configuration and one file of weights, as ``save_pretrained`` writes it."""

    format = "pretrained"

    def __init__(self, path: Path, files: OpenFiles) -> None:
        super().__init__(path, files)
        opened = self.open_shard(weights_in(path))
        self.root, self.extras = opened.root, opened.extras
        self.provenance = self.provenance or opened.provenance

    @classmethod
    def recognises(cls, path: Path, start: bytes) -> bool:
        """Return whether a folder has a configuration, and one file of weights only."""
        if not (path / _DESCRIPTION).is_file():
            return False
        weights = checkpoints_in(path)
        return len(weights) == 1 and weights[0].suffix in _SUFFIXES


def weights_in(folder: Path) -> Path:
    """Return the file of weights in a folder of the format :class:`Pretrained`."""
    (weights,) = checkpoints_in(folder)
    return weights


def _find_index(folder: Path) -> Path | None:
    indices = [path for path in sort_folder(folder) if path.name.endswith(INDEX_SUFFIXES)]
    return min(indices, key=lambda path: path.name.endswith(INDEX_SUFFIXES[1]), default=None)


def _weight_map(folder: Path, files: OpenFiles) -> Mapping[str, Path]:
    """Return which shard has which tensor."""
    index = _find_index(folder)
    assert index is not None
    try:
        content = json.loads(files.first_bytes(index, _LARGEST_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        raise damaged(index, "it is not JSON") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise damaged(index, "it has no weight_map")
    return {name: member(folder, shard) for name, shard in weight_map.items()}
