"""Giving a complete file or folder its name, at once and without losing what had it before.

Obstacles to an output (:func:`check_output`) are found before the work begins.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bnguard.checkpoint.formats import FORMATS
from bnguard.checkpoint.formats.hugging_face import Pretrained, weights_in
from bnguard.checkpoint.reading import checkpoint_at, format_of
from bnguard.checkpoint.storage import OpenFiles
from bnguard.errors import CheckpointError

_PREFIX, _SUFFIX = ".bnguard-", ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path, source: Path, *, is_folder: bool, force: bool) -> None:
    """Refuse a name under which a file or folder cannot be written.

    Args:
        output: The name.
        source: The original, which is never overwritten.
        is_folder: Whether a folder is to be written.
        force: Whether a file or folder of that name may be replaced.

    Raises:
        CheckpointError: It is the original or inside it, it is taken, or its folder does not exist
            or cannot be written into.
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
    """Refuse a checkpoint that cannot be replaced in place, with the original as a backup.

    Raises:
        CheckpointError: It is a folder of several files; the backup exists, or the folder cannot
            be written into.
    """
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
def temporary_beside(path: Path, *, like: Path) -> Iterator[Path]:
    """Make an empty file or folder next to ``path``, of the kind that ``like`` is.

    If it still has its temporary name at the end, it is removed, also after an exception.
    """
    if like.is_dir():
        made = Path(tempfile.mkdtemp(_SUFFIX, _PREFIX, path.parent))
    else:
        handle, name = tempfile.mkstemp(_SUFFIX, _PREFIX, path.parent)
        os.close(handle)
        made = Path(name)
    try:
        yield made
    finally:
        _remove(made)


def publish(copy: Path, name: Path, *, like: Path, force: bool) -> None:
    """Give a complete copy its name.

    A file replaces another one in one step. A replaced folder has a temporary name between two
    renamings.

    Args:
        copy: The copy.
        name: The name.
        like: The original, whose permissions the copy gets.
        force: Whether to replace a file or folder of that name.

    Raises:
        CheckpointError: Something has the name by now.
        OSError: The system refuses; the name leads to what it led to before.
    """
    _bring_to_disk(copy, like)
    if name.exists() and not force:
        raise _exists(name)
    if copy.is_dir() and name.exists():
        aside = name.rename(name.with_name(f"{_PREFIX}{uuid.uuid4().hex}{_SUFFIX}"))
        try:
            copy.rename(name)
        except BaseException:
            aside.rename(name)
            raise
        _remove(aside)
    else:
        copy.replace(name)
    _sync(name.parent)


def replace_with_backup(copy: Path, name: Path) -> None:
    """Give a complete copy the name of a file, which is kept under the name of the backup.

    The file has its old or its new content at any moment. An older backup is replaced.

    Raises:
        OSError: The system refuses; the file is as it was.
    """
    _bring_to_disk(copy, name)
    backup = backup_of(name)
    with temporary_beside(backup, like=name) as second:
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
    """Turn errors of the system into one line.

    Raises:
        CheckpointError: The block raised an ``OSError``.
    """
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
    """Give a copy the permissions of the original, and bring it to the disk."""
    for path in (*copy.rglob("*"), copy):
        if path.is_symlink():  # a broken one
            continue
        counterpart = original / path.relative_to(copy) if path != copy else original
        if counterpart.exists():
            shutil.copymode(counterpart, path)
        _sync(path)


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
