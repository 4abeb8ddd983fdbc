"""From what a user names, files, folders and patterns, to the checkpoints to read."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from bnguard.checkpoint.formats import FOLDER_FORMATS, checkpoint_at
from bnguard.checkpoint.formats.folders import ENDINGS, is_checkpoint_name, listed
from bnguard.errors import CheckpointError


def find_checkpoints(paths: Iterable[str | Path]) -> tuple[Path, ...]:
    """Return the checkpoints that files, folders and patterns name, each once.

    A folder stands for all checkpoints in it and below; one that is a checkpoint itself (sharded,
    distributed, or saved by transformers) stands for that, and those in folders below it. What does
    not exist, and a folder without checkpoints, is returned as it is: reading it says what is
    wrong, and the others are still read.
    """
    found = (checkpoint for path in paths for checkpoint in _named(str(path)))
    return tuple(dict.fromkeys(found))


def name_beside(checkpoint: Path, word: str) -> Path:
    """Return the name of a copy beside a checkpoint, a file or a folder.

    >>> name_beside(Path("runs/last.pth.tar"), "recalibrated").name
    'last-recalibrated.pth.tar'
    >>> name_beside(Path("epoch=3-loss=0.25"), "swapped").name
    'epoch=3-loss=0.25-swapped'
    """
    path = checkpoint.resolve() if checkpoint.name in ("", "..") else checkpoint
    return path.with_name(f"{path.name.removesuffix(_ending(path))}-{word}{_ending(path)}")


def _ending(path: Path) -> str:
    """Return what stands behind the name: nothing for a folder, and no digits of a number."""
    if path.is_dir():
        return ""
    known = next((ending for ending in ENDINGS if path.name.endswith(ending)), None)
    return known or (path.suffix if path.suffix[1:].isalpha() else "")


def _named(name: str) -> Iterator[Path]:
    # Path.glob takes no absolute pattern.
    matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207
    is_pattern = matches and not Path(name).exists()
    for path in map(Path, matches) if is_pattern else [Path(name)]:
        try:
            inside = list(_below(path)) if path.is_dir() else [checkpoint_at(path)]
        except (CheckpointError, OSError):
            inside = []
        yield from inside or [path]


def _below(folder: Path) -> Iterator[Path]:
    is_one = any(candidate.recognises(folder) for candidate in FOLDER_FORMATS)
    if is_one:
        yield folder
    for path in listed(folder):
        if path.is_dir() and not path.is_symlink():
            yield from _below(path)
        elif not is_one and is_checkpoint_name(path.name):
            yield path
