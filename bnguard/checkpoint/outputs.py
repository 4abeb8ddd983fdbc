"""Where a checkpoint is written to, and what stands in its way: found out before the work."""

from __future__ import annotations

import os
from pathlib import Path

from bnguard.checkpoint.atomic_writing import exists, no_folder, write_errors
from bnguard.checkpoint.formats import FORMATS, checkpoint_at, format_of
from bnguard.checkpoint.formats.hugging_face import Pretrained, weights_in
from bnguard.errors import CheckpointError


def check_output(output: Path, source: Path, *, is_folder: bool, force: bool) -> None:
    """Refuse a name under which a file or folder cannot be written.

    Args:
        output: The name.
        source: The checkpoint that it comes from, which is never written over.
        is_folder: Whether a folder is to be written.
        force: Whether something that has the name may be replaced.

    Raises:
        CheckpointError: It is the original, something that may not be replaced has it, or it is
            in a folder that does not exist or that nothing can be written into.
    """
    with write_errors(output):
        if output.exists():
            _check_replaceable(output, source, is_folder, force)
        _check_folder(output)


def check_backup(original: Path, *, force: bool) -> None:
    """Refuse a checkpoint that cannot be replaced in place, with the original as a backup.

    Raises:
        CheckpointError: It is a folder of several files; the backup exists, or nothing can be
            written into the folder.
    """
    if original.is_dir():
        raise CheckpointError(
            f"{original}: only a checkpoint of one file can be replaced in place; write a copy of "
            "the folder under another name (--output)"
        )
    backup = backup_of(original)
    with write_errors(backup):
        if backup.exists() and not force:
            raise exists(backup)
        _check_folder(backup)


def original_of(path: str | Path) -> Path:
    """Return what is replaced in place of a checkpoint: a file where only one changes.

    Where the path is a link, that is what it leads to.
    """
    source = checkpoint_at(path)
    if isinstance(format_of(source), Pretrained):
        source = weights_in(source)
    has_name = source.name not in ("", "..")
    return source if has_name and not source.is_symlink() else source.resolve()


def backup_of(original: Path) -> Path:
    """Return the name of the backup.

    >>> backup_of(Path("runs/last.ckpt")).as_posix()
    'runs/last.ckpt.bak'
    """
    return original.with_name(f"{original.name}.bak")


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise no_folder(path)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{path}: cannot be written, because nothing may be written into {path.parent}; "
            "choose another output"
        )


def _check_replaceable(output: Path, source: Path, is_folder: bool, force: bool) -> None:
    if output.samefile(source):
        raise CheckpointError(f"{output}: is the original; choose another output")
    if not (output.is_file() or output.is_dir()):
        raise CheckpointError(f"{output}: is neither a file nor a folder; choose another output")
    if is_folder != output.is_dir():
        is_, be = ("a file", "a folder") if is_folder else ("a folder", "a file")
        raise CheckpointError(f"{output}: is {is_}, and {be} is to be written; name {be}")
    if not force:
        raise exists(output)
    # A folder goes with all that is in it: it may be somebody's home.
    if output.is_dir() and not any(known.recognises(output) for known in FORMATS):
        raise CheckpointError(
            f"{output}: is a folder, and no checkpoint, so it is not replaced; "
            "choose another output"
        )
