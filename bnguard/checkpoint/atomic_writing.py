"""Giving a complete file or folder its name, at once and without losing what had it before.

What stands in the way of an output (:func:`check_output`) is found out before the work begins.
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

from bnguard.checkpoint.formats import FORMATS, checkpoint_at, format_of
from bnguard.checkpoint.formats.hugging_face import Pretrained, weights_in
from bnguard.errors import CheckpointError

_PREFIX, _SUFFIX = ".bnguard-", ".tmp"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(output: Path, source: Path, *, is_folder: bool, force: bool) -> None:
    """Refuse a name under which a file or folder cannot be written.

    Args:
        output: The name.
        source: The checkpoint that it comes from, which is never written over.
        is_folder: Whether a folder is to be written.
        force: Whether something that has the name may be replaced.

    Raises:
        CheckpointError: It is the original or inside it, something that may not be replaced has
            it, or it is in a folder that does not exist or that nothing can be written into.
    """
    with write_errors(output):
        if output.exists():
            _check_replaceable(output, source, is_folder, force)
        if source.resolve() in output.resolve().parents:
            raise CheckpointError(
                f"{output}: lies inside the checkpoint {source}; choose an output elsewhere"
            )
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


def exists(path: Path) -> CheckpointError:
    """Return the error for a name that is taken."""
    return CheckpointError(
        f"{path}: exists already; move it away, or force it to be replaced (--force)"
    )


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
