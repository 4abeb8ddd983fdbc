"""The formats of checkpoints that bnguard knows, a file each."""

from __future__ import annotations

from pathlib import Path

from bnguard.checkpoint.files import first_bytes, unreadable
from bnguard.checkpoint.formats.base import ENDINGS, Format, checkpoints_in
from bnguard.checkpoint.formats.distributed import METADATA, Distributed
from bnguard.checkpoint.formats.hugging_face import INDEX_SUFFIXES, Pretrained, Sharded
from bnguard.checkpoint.formats.safetensors import Safetensors
from bnguard.checkpoint.formats.torch_legacy import TorchLegacy
from bnguard.checkpoint.formats.torch_zip import TorchZip
from bnguard.errors import CheckpointError, NoBatchNormError

FILE_FORMATS: tuple[Format, ...] = (TorchZip(), TorchLegacy(), Safetensors())
# A folder of one file comes last: the others hold files that could be taken for the one.
FOLDER_FORMATS: tuple[Format, ...] = (Distributed(), Sharded(), Pretrained())
# So much of a file tells whether it is text.
_TEXT_BYTES = 4096
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
        raise _no_checkpoint(path)
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty; save the checkpoint again")
    if not path.is_file():
        raise CheckpointError(f"{path}: a pipe or a device; write it to a file, and name that")
    unknown = NoBatchNormError if _is_text(path) else CheckpointError
    raise unknown(
        f"{path}: no checkpoint that bnguard knows; give a file that torch, Lightning or "
        "safetensors wrote"
    )


def _is_text(path: Path) -> bool:
    """Whether a file holds text of its own, as SpeechBrain's counters do, and is no LFS pointer."""
    start = first_bytes(path, _TEXT_BYTES)
    return not start.startswith(b"version https://git-lfs") and all(
        byte in b"\t\n\r" or 32 <= byte < 127 for byte in start
    )


def _no_checkpoint(folder: Path) -> CheckpointError:
    """Return the error for a folder that is none, with what may have been meant."""
    files = checkpoints_in(folder)
    if not files:
        endings = ", ".join(ENDINGS[:-1])
        return CheckpointError(
            f"{folder}: a folder without a checkpoint: nothing in it ends in {endings} or "
            f"{ENDINGS[-1]}; name the file"
        )
    others = f", or one of {len(files) - 1} more" if len(files) > 1 else ""
    return CheckpointError(f"{folder}: a folder; name the checkpoint in it: {files[0]}{others}")
