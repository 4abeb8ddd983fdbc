"""From what a user names to checkpoints that are read: of whatever format, one or many."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bnguard.checkpoint.bn_entries import LIGHTNING_PREFIX, Checkpoint, describe, groups_by_model
from bnguard.checkpoint.contents import Contents, entries
from bnguard.checkpoint.formats import FOLDER_FORMATS, checkpoint_at, format_of
from bnguard.checkpoint.formats.base import ENDINGS, is_checkpoint_name, listed
from bnguard.checkpoint.stored_tensors import StoredTensor, torch_dtype
from bnguard.errors import CheckpointError
from bnguard.layers.names import without_wrappers

if TYPE_CHECKING:
    from torch import Tensor

# What torch.optim.swa_utils.AveragedModel keeps beside the model that it wraps.
_AVERAGED_MODELS_OWN = "n_averaged"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the BN layers of a checkpoint, and what it says about its training.

    Nothing in the file is executed, and no class that it mentions is imported; torch is not
    imported either. Of the tensors, those of BN layers alone are read.

    Args:
        path: A file, or the folder of a sharded or distributed checkpoint.

    Raises:
        CheckpointError: It cannot be read, is damaged, or is of no format that bnguard knows.
    """
    with open_contents(checkpoint_at(path)) as contents:
        return describe(contents)


def load_state_dict(path: str | Path, model: str | None = None) -> dict[str, Tensor]:
    """Load the state dict of one model in a checkpoint, on the CPU, as safely as it is inspected.

    Keys are those of the model's own ``state_dict()``: what wrappers (``DataParallel``,
    ``torch.compile``) put before all of them is taken off, but for Lightning, which does so
    itself. Entries that are no tensors stay out.

    Args:
        path: A file, or the folder of a sharded or distributed checkpoint.
        model: Prefix of the model (:attr:`CheckpointModel.prefix`) or of a part of it; not
            needed where the checkpoint has one, or is Lightning's.

    Raises:
        CheckpointError: It cannot be read, has no such model, or several to choose from.
    """
    with open_contents(checkpoint_at(path)) as contents:
        prefix = _chosen(contents, model)
        stored = {
            key: entry.value
            for entry in entries(contents)
            if isinstance(entry.value, StoredTensor) and (key := entry.key_in(prefix)) is not None
        }
        loaded = {key: _load(value) for key, value in stored.items()}
        return loaded if contents.is_lightning else _without_common_wrappers(loaded)


@contextmanager
def open_contents(path: Path) -> Iterator[Contents]:
    """Open a checkpoint; tensors in it can be read until it is closed.

    Raises:
        CheckpointError: It cannot be read, is damaged, or is of no format that bnguard knows.
    """
    with format_of(path).open(path) as contents:
        yield contents


def _chosen(contents: Contents, model: str | None) -> str:
    groups = groups_by_model(contents)
    prefixes = list(groups)
    names = ", ".join(repr(prefix) for prefix in prefixes)
    is_there = model in prefixes or any(
        model is not None and model.startswith(prefix) and group.prefix.startswith(model)
        for prefix in prefixes
        for group in groups[prefix]
    )
    if model is not None and not is_there:
        raise CheckpointError(
            f"{contents.path}: has no model {model!r} with BN layers; it has {names or 'none'}"
        )
    if model is None and not prefixes:
        raise CheckpointError(f"{contents.path}: has no BN layers; nothing to do here")
    if model is not None:
        return model
    if contents.is_lightning and LIGHTNING_PREFIX in prefixes:
        return LIGHTNING_PREFIX
    if len(prefixes) > 1:
        raise CheckpointError(f"{contents.path}: has several models, {names}; name one of them")
    return prefixes[0]


def _load(tensor: StoredTensor) -> Tensor:
    import torch

    dtype = torch_dtype(tensor.dtype)
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=dtype, device="meta")
    return torch.from_numpy(tensor.read()).view(dtype)


def _without_common_wrappers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    wrapped = [key for key in state_dict if key != _AVERAGED_MODELS_OWN]
    depths = {key.count(".") - without_wrappers(key).count(".") for key in wrapped}
    if len(depths) != 1 or depths == {0}:
        return state_dict
    return {without_wrappers(key): state_dict[key] for key in wrapped}


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
