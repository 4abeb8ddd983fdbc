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
    try:
        if copy.is_dir():
            copy.rename(name)
        else:
            _rename_new(copy, name)
    except OSError:
        if name.exists():
            raise exists(name) from None
        raise
    _sync(name.parent)


def replace(copy: Path, name: Path) -> None:
    """Give a complete copy the name of something else, which is removed.

    A file is replaced in one step. Of two folders, for the moment between two renamings, the old
    one has a temporary name and the new one its own.

    Raises:
        OSError: The system does not let us; the name leads to what it led to before.
    """
    if copy.is_dir():
        with _set_aside(name):
            copy.rename(name)
    else:
        copy.replace(name)
    _sync(name.parent)


def replace_with_backup(copy: Path, name: Path, backup: Path) -> None:
    """Give a complete copy the name of something else, which gets the name of the backup.

    An older backup is removed once all is done. A file has its old or its new content at any
    moment; of two folders, for the moment between two renamings, there is the backup alone.

    Raises:
        OSError: The system does not let us; the names lead to what they led to before.
    """
    with _set_aside(backup):
        if name.is_dir():
            _exchange_folders(copy, name, backup)
        else:
            _exchange_files(copy, name, backup)
    _sync(name.parent)


def _exchange_folders(copy: Path, name: Path, backup: Path) -> None:
    try:
        name.rename(backup)
        copy.rename(name)
    except BaseException:
        if not name.exists():
            backup.rename(name)
        raise


def _exchange_files(copy: Path, name: Path, backup: Path) -> None:
    try:
        _second_name(name, backup)
        copy.replace(name)
    except BaseException:
        # Only where the original still has its own name may the second one go.
        if backup.exists() and backup.samefile(name):
            backup.unlink()
        raise


@contextmanager
def _set_aside(path: Path) -> Iterator[None]:
    """Free a name for the block; what had it is removed afterwards, or put back if that fails."""
    if not path.exists():
        yield
        return
    aside = path.with_name(f"{_PREFIX}{uuid.uuid4().hex}{_SUFFIX}")
    try:
        path.rename(aside)
        yield
    except BaseException:
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    _remove(aside)


def _rename_new(copy: Path, name: Path) -> None:
    try:
        # A link, unlike a renaming, never replaces what came into being in the meantime.
        os.link(copy, name)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if name.exists():
            raise
        copy.rename(name)


def _second_name(name: Path, second: Path) -> None:
    try:
        os.link(name, second)
    except OSError:  # a file system without links
        with temporary_beside(second, like=name) as copy:
            shutil.copy2(name, copy)
            _sync(copy)
            copy.rename(second)


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
