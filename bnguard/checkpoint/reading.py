"""From what a user names to checkpoints that are read: of whatever format, one or many."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bnguard.checkpoint.bn_entries import describe, groups_by_model
from bnguard.checkpoint.contents import entries
from bnguard.checkpoint.formats import (
    FORMATS,
    OpenCheckpoint,
    checkpoints_in,
    endings,
    is_checkpoint_name,
    register_format,
    sort_folder,
)
from bnguard.checkpoint.formats.distributed import METADATA, Distributed
from bnguard.checkpoint.formats.hugging_face import INDEX_SUFFIXES, Pretrained, Sharded
from bnguard.checkpoint.formats.plain_pickle import PlainPickle
from bnguard.checkpoint.formats.safetensors import Safetensors
from bnguard.checkpoint.formats.torch_legacy import TorchLegacy
from bnguard.checkpoint.formats.torch_zip import TorchZip
from bnguard.checkpoint.result import LIGHTNING_PREFIX, Checkpoint
from bnguard.checkpoint.storage import OpenFiles, StoredTensor, torch_dtype, unreadable
from bnguard.errors import CheckpointError, NoBatchNormError
from bnguard.layers.names import without_wrappers

if TYPE_CHECKING:
    from torch import Tensor

# The last one is asked first. The files in folders of the others could be taken for a Pretrained,
# and the first bytes of each other file for a pickle.
for _built_in in (
    PlainPickle,
    Pretrained,
    Sharded,
    Distributed,
    Safetensors,
    TorchLegacy,
    TorchZip,
):
    register_format(_built_in)

# Enough to recognise a format, or a file that is text.
_START_BYTES = 4096
# What has the name of a checkpoint by mistake, by its first bytes.
_MISTAKEN = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file; get that with git lfs pull",
    b"<": "a web page, not a checkpoint; download it again, the server may want a login",
    b"\x1f\x8b": "compressed by gzip; decompress it with gunzip",
}
# What torch.optim.swa_utils.AveragedModel keeps next to the model that it wraps.
_AVERAGED_MODELS_OWN = "n_averaged"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the BN layers of a checkpoint, and what it says about its training.

    Nothing in the file is executed, no class that it mentions is imported, and torch is not
    imported either. Of the tensors, only those of BN layers are read.

    Args:
        path: A file, or the folder of a sharded or distributed checkpoint.

    Raises:
        CheckpointError: It cannot be read, is damaged, or its format is unknown.
    """
    with open_checkpoint(path) as checkpoint:
        return describe(checkpoint)


def load_state_dict(path: str | Path, model: str | None = None) -> dict[str, Tensor]:
    """Load the state dict of one model in a checkpoint, on the CPU, as safely as it is inspected.

    Keys are those of the model's own ``state_dict()``, without what wrappers (``DataParallel``,
    ``torch.compile``) put before all of them; Lightning removes that itself. Entries that are not
    tensors are left out.

    Args:
        path: A file, or the folder of a sharded or distributed checkpoint.
        model: Prefix of the model (:attr:`CheckpointModel.prefix`) or of a part of it; not
            needed if the checkpoint has one, or is Lightning's.

    Raises:
        CheckpointError: It cannot be read, lacks the model, or has several to choose from.
    """
    with open_checkpoint(path) as checkpoint:
        return load_model(checkpoint, _choose_model(checkpoint, model))


def load_model(checkpoint: OpenCheckpoint, prefix: str) -> dict[str, Tensor]:
    """Load the state dict of a model in an open checkpoint, as :func:`load_state_dict` does."""
    loaded = {
        key: _load(entry.value)
        for entry in entries(checkpoint)
        if isinstance(entry.value, StoredTensor) and (key := entry.key_in(prefix)) is not None
    }
    return loaded if checkpoint.is_lightning else _without_common_wrappers(loaded)


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[OpenCheckpoint]:
    """Open a checkpoint; tensors in it can be read until it is closed."""
    path = checkpoint_at(path)
    with OpenFiles() as files:
        yield format_of(path, files)(path, files)


def checkpoint_at(path: str | Path) -> Path:
    """Return the checkpoint that a path names: the folder if it names the description of one."""
    path = Path(path)
    is_description = path.name == METADATA or path.name.endswith(INDEX_SUFFIXES)
    return path.parent if is_description else path


def format_of(path: Path, files: OpenFiles) -> type[OpenCheckpoint]:
    """Return the format of a checkpoint."""
    try:
        is_there = path.exists()
    except OSError as error:
        raise unreadable(path, error) from error
    if not is_there:
        raise CheckpointError(f"{path}: no such file or folder; check the path")
    start = files.first_bytes(path, _START_BYTES)
    for candidate in FORMATS:
        if candidate.recognises(path, start):
            return candidate
    if path.is_dir():
        raise _not_a_checkpoint(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: a pipe or a device; save it to a file first")
    if not start:
        raise CheckpointError(f"{path}: the file is empty; save the checkpoint again")
    for beginning, what in _MISTAKEN.items():
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(beginning):
            raise CheckpointError(f"{path}: {what}")
    # Text of its own, as SpeechBrain's counters are.
    is_text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start)
    raise (NoBatchNormError if is_text else CheckpointError)(
        f"{path}: not a checkpoint of a known format; use a file that torch, Lightning or "
        "safetensors wrote"
    )


def _not_a_checkpoint(folder: Path) -> CheckpointError:
    files = checkpoints_in(folder)
    if not files:
        *known, last = endings()
        return CheckpointError(
            f"{folder}: a folder without a checkpoint: nothing in it ends in {', '.join(known)} or "
            f"{last}; name the file"
        )
    others = f", or one of {len(files) - 1} more" if len(files) > 1 else ""
    return CheckpointError(f"{folder}: a folder; name the checkpoint in it: {files[0]}{others}")


def _choose_model(checkpoint: OpenCheckpoint, model: str | None) -> str:
    groups = groups_by_model(checkpoint)
    names = ", ".join(map(repr, groups))
    if model is not None:
        is_part = any(
            model.startswith(prefix) and group.prefix.startswith(model)
            for prefix, inside in groups.items()
            for group in inside
        )
        if model in groups or is_part:
            return model
        raise CheckpointError(
            f"{checkpoint.path}: has no model {model!r} with BN layers; it has {names or 'none'}"
        )
    if not groups:
        raise CheckpointError(f"{checkpoint.path}: has no BN layers; nothing to do here")
    if checkpoint.is_lightning and LIGHTNING_PREFIX in groups:
        return LIGHTNING_PREFIX
    if len(groups) > 1:
        raise CheckpointError(f"{checkpoint.path}: has several models, {names}; name one of them")
    return next(iter(groups))


def _load(tensor: StoredTensor) -> Tensor:
    import torch

    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype), device="meta")
    return torch.from_numpy(tensor.read()).view(torch_dtype(tensor.dtype))


def _without_common_wrappers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    wrapped = [key for key in state_dict if key != _AVERAGED_MODELS_OWN]
    depths = {key.count(".") - without_wrappers(key).count(".") for key in wrapped}
    if len(depths) != 1 or depths == {0}:
        return state_dict
    return {without_wrappers(key): state_dict[key] for key in wrapped}


def find_checkpoints(paths: Iterable[str | Path]) -> tuple[Path, ...]:
    """Return the checkpoints that files, folders and patterns name, each once.

    A folder means all checkpoints in it and below; one that is a checkpoint itself (sharded,
    distributed, or saved by transformers) means that one and those in folders below it. A path that
    does not exist, and a folder without checkpoints, is returned as it is: reading it raises the
    error that says what is wrong, and the others are still read.

    Raises:
        CheckpointError: A path is empty, which would mean the current folder.
    """
    if "" in (paths := list(paths)):
        raise CheckpointError("a path is empty: is a variable of the shell not set?")
    found = (checkpoint for path in paths for checkpoint in _expand(str(path)))
    return tuple(dict.fromkeys(found))


def name_beside(checkpoint: Path, word: str) -> Path:
    """Return the name of a copy next to a checkpoint, a file or a folder.

    >>> name_beside(Path("runs/last.pth.tar"), "recalibrated").name
    'last-recalibrated.pth.tar'
    >>> name_beside(Path("epoch=3-loss=0.25"), "swapped").name
    'epoch=3-loss=0.25-swapped'
    """
    path = checkpoint.resolve() if checkpoint.name in ("", "..") else checkpoint
    ending = next((ending for ending in endings() if path.name.endswith(ending)), "")
    if path.is_dir():
        ending = ""
    elif not ending and path.suffix[1:].isalpha():  # and not the digits of a number
        ending = path.suffix
    return path.with_name(f"{path.name.removesuffix(ending)}-{word}{ending}")


def _expand(name: str) -> Iterator[Path]:
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
    is_one = any(candidate.recognises(folder, b"") for candidate in FORMATS)
    if is_one:
        yield folder
    for path in sort_folder(folder):
        if path.is_dir() and not path.is_symlink():
            yield from _below(path)
        elif not is_one and is_checkpoint_name(path.name):
            yield path
