"""Hugging Face's folder of one file: the weights, and beside them what describes the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bnguard.checkpoint.contents import Contents
from bnguard.checkpoint.formats.base import Format
from bnguard.checkpoint.formats.folders import checkpoints_in, copy_folder, read_note
from bnguard.checkpoint.formats.sharded import shard_format
from bnguard.checkpoint.patch import Patch

_DESCRIPTION = "config.json"
_SUFFIXES = (".safetensors", ".bin")


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
