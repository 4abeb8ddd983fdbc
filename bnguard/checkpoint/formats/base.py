"""What a format of checkpoints has to do: recognise a path, open it, copy it with changes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from bnguard.checkpoint.contents import Contents
from bnguard.checkpoint.patch import Patch


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
