"""Giving a complete file or folder its name, at once and without losing what had it before.

Obstacles to an output (:func:`check_output`) are found before the work begins.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bnguard.checkpoint.formats import FORMATS
from bnguard.checkpoint.formats.hugging_face import Pretrained, weights_in
from bnguard.checkpoint.reading import checkpoint_at, format_of
from bnguard.checkpoint.storage import OpenFiles
from bnguard.errors import CheckpointError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path, source: Path, *, is_folder: bool, force: bool) -> None:
    """Refuse a name under which a file, or a folder, cannot be written.

    It is the original or inside it, it is taken and not to be replaced by force, or its folder does
    not exist or cannot be written into.
    """
    with write_errors(output):
        if output.exists():
            _check_replaceable(output, source, is_folder, force)
        if source.resolve() in output.resolve().parents:
            raise CheckpointError(
                f"{output}: is inside the checkpoint {source}; choose an output elsewhere"
            )
        _check_folder(output)


def check_backup(original: Path, *, force: bool) -> None:
    """Refuse a checkpoint that cannot be replaced in place, with the original as a backup."""
    if original.is_dir():
        raise CheckpointError(
            f"{original}: only a checkpoint of one file can be replaced in place; write a copy of "
            "the folder under another name (--output)"
        )
    backup = backup_of(original)
    with write_errors(backup):
        if backup.exists() and not force:
            raise _exists(backup)
        _check_folder(backup)


def original_of(path: str | Path) -> Path:
    """Return the file that is replaced when a checkpoint is changed in place.

    That is the target of a link, and the only file of weights in a folder.
    """
    source = checkpoint_at(path)
    with OpenFiles() as files:
        if format_of(source, files) is Pretrained:
            source = weights_in(source)
    has_name = source.name not in ("", "..")
    return source if has_name and not source.is_symlink() else source.resolve()


def backup_of(original: Path) -> Path:
    """Return the name of the backup.

    >>> backup_of(Path("runs/last.ckpt")).as_posix()
    'runs/last.ckpt.bak'
    """
    return original.with_name(f"{original.name}.bak")


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Make a folder next to ``path`` for what will get that name; it is removed at the end."""
    with tempfile.TemporaryDirectory(".tmp", ".bnguard-", path.parent) as name:
        yield Path(name)


def publish(copy: Path, name: Path, *, like: Path, force: bool) -> None:
    """Give a complete copy its name, and the permissions of the original that it is like.

    A file replaces another one in one step. A replaced folder has a temporary name, next to the
    copy, between two renamings. If the system refuses, the name leads to what it led to before.
    """
    _bring_to_disk(copy, like)
    if name.exists() and not force:
        raise _exists(name)
    if copy.is_dir() and name.exists():
        aside = name.rename(copy.with_name(f"{copy.name}-replaced"))
        try:
            copy.rename(name)
        except BaseException:
            aside.rename(name)
            raise
    else:
        copy.replace(name)
    # Only now: a folder without write permission cannot be moved into another one.
    shutil.copymode(like, name)
    _sync(name.parent)


def replace_with_backup(copy: Path, name: Path) -> None:
    """Give a complete copy the name of a file, which is kept under the name of the backup.

    The file has its old or its new content at any moment, also if the system refuses. An older
    backup is replaced.
    """
    _bring_to_disk(copy, name)
    backup = backup_of(name)
    second = copy.with_name(f"{copy.name}-backup")
    shutil.copy2(name, second)
    _sync(second)
    second.replace(backup)
    try:
        copy.replace(name)
    except BaseException:
        backup.unlink()
        raise
    _sync(name.parent)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn errors of the system into a ``CheckpointError`` of one line."""
    try:
        yield
    except OSError as error:
        if not path.parent.is_dir():
            raise _no_folder(path) from error
        space = "free some space or " if error.errno in _FULL else ""
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}; the original is untouched, "
            f"{space}choose another output"
        ) from error


def _no_folder(path: Path) -> CheckpointError:
    state = "is a file" if path.parent.exists() else "does not exist"
    return CheckpointError(
        f"{path}: cannot be written, because the folder {path.parent} {state}; "
        "make it, or choose another output"
    )


def _exists(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: exists already; move it away, or force it to be replaced (--force)"
    )


def _bring_to_disk(copy: Path, original: Path) -> None:
    """Give a file, or all in a folder, the permissions of the original; bring it to the disk."""
    for path in copy.rglob("*") if copy.is_dir() else [copy]:
        if path.is_symlink():  # a broken one
            continue
        counterpart = original / path.relative_to(copy) if path != copy else original
        if counterpart.exists():
            shutil.copymode(counterpart, path)
        _sync(path)
    _sync(copy)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise _no_folder(path)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"{path}: cannot be written, because {path.parent} is not writable; "
            "choose another output"
        )


def _check_replaceable(output: Path, source: Path, is_folder: bool, force: bool) -> None:
    if output.samefile(source):
        raise CheckpointError(f"{output}: the original itself; choose another output")
    if not (output.is_file() or output.is_dir()):
        raise CheckpointError(f"{output}: not a file or a folder; choose another output")
    if is_folder != output.is_dir():
        found, needed = ("file", "folder") if is_folder else ("folder", "file")
        raise CheckpointError(f"{output}: a {found}, but the output is a {needed}; name a {needed}")
    if not force:
        raise _exists(output)
    # A folder goes with all that is in it: it may be somebody's home.
    if output.is_dir() and not any(known.recognises(output, b"") for known in FORMATS):
        raise CheckpointError(
            f"{output}: a folder that is not a checkpoint is not replaced; choose another output"
        )
