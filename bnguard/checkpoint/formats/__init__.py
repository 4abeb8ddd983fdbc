"""The formats of checkpoints that bnguard knows, a file each."""

from __future__ import annotations

from pathlib import Path

from bnguard.checkpoint.formats.base import Format
from bnguard.checkpoint.formats.distributed import METADATA, Distributed
from bnguard.checkpoint.formats.safetensors import Safetensors
from bnguard.checkpoint.formats.sharded import INDEX_SUFFIXES, Sharded
from bnguard.checkpoint.formats.torch_legacy import TorchLegacy
from bnguard.checkpoint.formats.torch_zip import TorchZip
from bnguard.checkpoint.sources import unreadable
from bnguard.errors import CheckpointError

FILE_FORMATS: tuple[Format, ...] = (TorchZip(), TorchLegacy(), Safetensors())
FOLDER_FORMATS: tuple[Format, ...] = (Distributed(), Sharded())
FORMATS = FILE_FORMATS + FOLDER_FORMATS


def checkpoint_at(path: str | Path) -> Path:
    """Return the checkpoint that a path names: the folder, where it names what describes one."""
    path = Path(path)
    is_description = path.name == METADATA or path.name.endswith(INDEX_SUFFIXES)
    return path.parent if is_description else path


def format_of(path: Path) -> Format:
    """Return the format of a checkpoint.

    Raises:
        CheckpointError: There is no such file, or it is of no format that bnguard knows.
    """
    try:
        is_there = path.exists()
    except OSError as error:
        raise unreadable(path, error) from error
    if not is_there:
        raise CheckpointError(f"{path}: no such file or folder; check the path")
    for candidate in FORMATS:
        if candidate.recognises(path):
            return candidate
    if path.is_dir():
        raise CheckpointError(
            f"{path}: a folder that is neither a sharded nor a distributed checkpoint; "
            "name the files in it"
        )
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; save the checkpoint again")
    raise CheckpointError(
        f"{path}: no checkpoint that bnguard knows; give a file that torch, Lightning or "
        "safetensors wrote"
    )
