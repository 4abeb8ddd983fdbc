"""What a format of checkpoints does: recognise a path, open it, copy it with changes.

And what formats of several files share: a folder, a note in it, how it is copied.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from bnguard.checkpoint.contents import LONGEST_PROVENANCE_BYTES, Contents, parse_provenance
from bnguard.checkpoint.files import Patch, first_bytes, unreadable
from bnguard.checkpoint.unpickling import damaged

# How names of checkpoints end; a file that is named is read whatever its name.
ENDINGS = (".ckpt", ".pt", ".pth", ".pth.tar", ".bin", ".safetensors")
# What transformers saves beside a model: no model is in these.
_COMPANIONS = ("training_args.bin", "optimizer.", "scheduler.", "scaler.", "rng_state")
_PROVENANCE = "bnguard-provenance.json"
CopyFile = Callable[[Path, Path, Sequence[Patch]], None]


class Format(ABC):
    """A format of checkpoints. It has no state; ``FORMATS`` lists one of each."""

    name: str

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether a file or folder is of this format, told by its first bytes.

        Raises:
            CheckpointError: It cannot be read.
        """

    @abstractmethod
    def open(self, path: Path) -> AbstractContextManager[Contents]:
        """Open a checkpoint; tensors in it can be read until it is closed.

        Raises:
            CheckpointError: It is damaged, or holds what bnguard cannot read.
        """

    @abstractmethod
    def copy(self, path: Path, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy a checkpoint with other bytes in some places, and a note of how it came about.

        Args:
            path: The checkpoint.
            target: What to write: an empty file or folder that is there already.
            patches: The places, which lie in storages of tensors and do not overlap.
            provenance: The note, as JSON; it takes the place of an older one.

        Raises:
            CheckpointError: The checkpoint cannot be read or is damaged.
            OSError: The copy cannot be written.
        """


def member(folder: Path, name: object) -> Path:
    """Return a file in a folder by the name that the checkpoint gives it.

    Raises:
        CheckpointError: The name leads out of the folder, or nowhere.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
        shown = name if isinstance(name, str) else type(name).__name__
        raise damaged(folder, f"it names a file outside the folder: {shown}")
    return folder / name


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the files in a folder, not below it, that are checkpoints by their names.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    return [path for path in listed(folder) if path.is_file() and is_checkpoint_name(path.name)]


def is_checkpoint_name(name: str) -> bool:
    """Return whether a file of this name is taken for a checkpoint.

    >>> is_checkpoint_name("last.ckpt"), is_checkpoint_name("optimizer.pt")
    (True, False)
    """
    return name.endswith(ENDINGS) and not name.startswith(_COMPANIONS)


def listed(folder: Path) -> list[Path]:
    """Return what is in a folder, in the order of names.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise unreadable(folder, error) from error


def read_note(folder: Path) -> Mapping[str, object] | None:
    """Return the note that bnguard left in a folder; None where there is none."""
    path = folder / _PROVENANCE
    return parse_provenance(first_bytes(path, LONGEST_PROVENANCE_BYTES)) if path.exists() else None


def copy_folder(
    folder: Path, target: Path, patches: Sequence[Patch], provenance: str, copy_patched: CopyFile
) -> None:
    """Copy a folder with all that is in it, and leave a note.

    Links are followed, as a cache of the Hub consists of them; one that leads nowhere stays one.

    Args:
        folder: The folder.
        target: An empty folder.
        patches: What changes in its files.
        provenance: The note, as JSON.
        copy_patched: Copies a file in which something changes.
    """
    for path in sorted(folder.rglob("*")):
        copy = target / path.relative_to(folder)
        inside = [patch for patch in patches if patch.path == path]
        if path.is_dir():
            copy.mkdir(exist_ok=True)
        elif not path.exists():
            copy.symlink_to(path.readlink())
        elif inside:
            copy_patched(path, copy, inside)
        else:
            shutil.copyfile(path, copy)
    (target / _PROVENANCE).write_text(provenance, encoding="utf-8")
