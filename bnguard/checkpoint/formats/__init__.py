"""What a format of checkpoints does: recognise a path, open it, copy it with changes.

Each format is a file of this folder. :func:`register_format` adds one; those of bnguard are
registered in ``bnguard.checkpoint.reading``.
"""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

from bnguard.checkpoint.storage import OpenFiles, Patch, Source, unreadable
from bnguard.checkpoint.unpickling import damaged, mapping_of

LONGEST_PROVENANCE_BYTES = 2**20
# What transformers saves next to a model.
_COMPANIONS = ("training_args.bin", "optimizer.", "scheduler.", "scaler.", "rng_state")
_NOTE = "bnguard-provenance.json"
_Format = TypeVar("_Format", bound="OpenCheckpoint")


class OpenCheckpoint(ABC):
    """A checkpoint whose files are open. A subclass is a format, and opens them in ``__init__``.

    Tensors can be read until ``files`` is closed.

    Args:
        path: The file or folder.
        files: Opens the files, each once, and closes them.

    Attributes:
        format: Name of the format.
        endings: How the names of its files end, by which they are found in a folder; a file that
            the user names is read whatever its name.
        path: The file or folder.
        root: The object that was saved: containers and atoms, with ``StoredTensor`` and
            inert placeholders for everything else.
        extras: What the format keeps next to the object, by name.
        provenance: What bnguard noted when it wrote the checkpoint; None if it did not.

    Raises:
        CheckpointError: It is damaged, or holds something that bnguard cannot read.
    """

    format: ClassVar[str]
    endings: ClassVar[tuple[str, ...]] = ()
    root: object
    extras: Mapping[str, object] = {}
    provenance: Mapping[str, object] | None = None

    def __init__(self, path: Path, files: OpenFiles) -> None:
        self.path = path
        self.files = files

    def open_file(self, path: Path) -> Source:
        """Open a file until the checkpoint is closed.

        Raises:
            CheckpointError: It cannot be opened.
        """
        return self.files.open(path)

    @classmethod
    @abstractmethod
    def recognises(cls, path: Path, start: bytes) -> bool:
        """Return whether a file or folder is of this format.

        Args:
            path: The file or folder.
            start: The first 4,096 bytes of the file; none of a folder.

        Raises:
            CheckpointError: It cannot be read.
        """

    @abstractmethod
    def copy(self, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the checkpoint with other bytes in some places, and with a note of what was done.

        Args:
            target: The file or folder to make.
            patches: The places, all in storages of tensors.
            provenance: The note, as JSON; it replaces an older one.

        Raises:
            CheckpointError: The checkpoint cannot be read or is damaged.
            OSError: The copy cannot be written.
        """

    @property
    def is_lightning(self) -> bool:
        """Whether a Lightning Trainer saved it."""
        return "pytorch-lightning_version" in (mapping_of(self.root) or {})


class OpenFolder(OpenCheckpoint):
    """A checkpoint of several files, with the note in a file of its own."""

    def __init__(self, path: Path, files: OpenFiles) -> None:
        super().__init__(path, files)
        note = path / _NOTE
        if note.exists():
            self.provenance = parse_provenance(files.first_bytes(note, LONGEST_PROVENANCE_BYTES))

    def copy(self, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy all that is in the folder, and leave a note.

        Links are followed, as a cache of the Hub consists of them; a broken one stays one.
        """
        target.mkdir()
        for path in sorted(self.path.rglob("*")):
            copy = target / path.relative_to(self.path)
            inside = [patch for patch in patches if patch.path == path]
            if path.is_dir():
                copy.mkdir()
            elif not path.exists():
                copy.symlink_to(path.readlink())
            elif inside:
                self.copy_file(path, copy, inside, provenance)
            else:
                shutil.copyfile(path, copy)
        (target / _NOTE).write_text(provenance, encoding="utf-8")

    @abstractmethod
    def copy_file(self, path: Path, copy: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy one of the files with other bytes in some places."""


FORMATS: list[type[OpenCheckpoint]] = []


def register_format(opens: type[_Format]) -> type[_Format]:
    """Let bnguard read, compare and write another format; it is asked before those known so far.

    Returns:
        The class, so that this serves as a decorator.
    """
    FORMATS.insert(0, opens)
    return opens


def endings() -> tuple[str, ...]:
    """Return how the names of checkpoints end, in all formats."""
    return tuple(ending for known in FORMATS for ending in known.endings)


def parse_provenance(text: bytes | str) -> Mapping[str, object]:
    """Return a provenance record; an empty one if it cannot be read."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def member(folder: Path, name: object) -> Path:
    """Return a file in a folder by the name that the checkpoint gives it."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
        shown = name if isinstance(name, str) else type(name).__name__
        raise damaged(folder, f"it names a file outside the folder: {shown}")
    return folder / name


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the files in a folder, not below it, that are checkpoints by their names."""
    return [
        path for path in sort_folder(folder) if path.is_file() and is_checkpoint_name(path.name)
    ]


def is_checkpoint_name(name: str) -> bool:
    """Return whether a file of this name is taken for a checkpoint.

    >>> is_checkpoint_name("last.ckpt"), is_checkpoint_name("optimizer.pt")
    (True, False)
    """
    return name.endswith(endings()) and not name.startswith(_COMPANIONS)


def sort_folder(folder: Path) -> list[Path]:
    """Return what is in a folder, in the order of names."""
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error
