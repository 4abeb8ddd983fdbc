"""Giving a complete file or folder its name, at once and without losing what had it before."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bnguard.errors import CheckpointError

_PREFIX, _SUFFIX = ".bnguard-", ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn what the system says against writing into one line.

    Raises:
        CheckpointError: The block raised an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        if not path.parent.is_dir():
            raise no_folder(path) from error
        space = "free some space or " if error.errno in _FULL else ""
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}; the original is untouched, "
            f"{space}choose another output"
        ) from error


def no_folder(path: Path) -> CheckpointError:
    """Return the error for a name in a folder that does not exist."""
    state = "is a file" if path.parent.exists() else "does not exist"
    return CheckpointError(
        f"{path}: cannot be written, because the folder {path.parent} {state}; "
        "make it, or choose another output"
    )


def save(content: object, path: Path) -> None:
    """Save with torch; what the system says against it is raised as it is.

    Raises:
        OSError: The file cannot be written.
    """
    import torch

    try:
        with path.open("wb") as handle:
            torch.save(content, handle)
    except RuntimeError as error:
        # torch complains of what came of a write that failed, or that Ctrl-C stopped.
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise


@contextmanager
def temporary_beside(path: Path, *, like: Path) -> Iterator[Path]:
    """Make an empty file or folder beside ``path``, of the kind that ``like`` is.

    Whatever still has its temporary name at the end is removed, also after an exception.
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


def settle(copy: Path, original: Path) -> None:
    """Give a copy the permissions of the original, and bring it to the disk."""
    for path in (*copy.rglob("*"), copy):
        if path.is_symlink():  # one that leads nowhere
            continue
        counterpart = original / path.relative_to(copy) if path != copy else original
        if counterpart.exists():
            shutil.copymode(counterpart, path)
        _sync(path)


def exists(path: Path) -> CheckpointError:
    """Return the error for a name that is taken."""
    return CheckpointError(
        f"{path}: exists already; move it away, or force it to be replaced (--force)"
    )


def publish(copy: Path, name: Path) -> None:
    """Give a complete copy a name that nothing has.

    Raises:
        CheckpointError: Something has the name by now.
        OSError: The system does not let us.
    """
    if name.exists():
        raise exists(name)
    copy.rename(name)
    _sync(name.parent)


def replace(copy: Path, name: Path) -> None:
    """Give a complete copy the name of something else, which is removed.

    A file is replaced in one step. A folder has a temporary name for the moment between two
    renamings.

    Raises:
        OSError: The system does not let us; the name leads to what it led to before.
    """
    if not copy.is_dir():
        copy.replace(name)
    else:
        aside = name.rename(name.with_name(f"{_PREFIX}{uuid.uuid4().hex}{_SUFFIX}"))
        try:
            copy.rename(name)
        except BaseException:
            aside.rename(name)
            raise
        _remove(aside)
    _sync(name.parent)


def replace_with_backup(copy: Path, name: Path, backup: Path) -> None:
    """Give a complete copy the name of a file, which is kept under the name of the backup.

    The file has its old or its new content at any moment. An older backup is replaced.

    Raises:
        OSError: The system does not let us; the file is as it was.
    """
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
