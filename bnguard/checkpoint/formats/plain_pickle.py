"""Plain pickles, as detectron2's model zoo has them: dictionaries of NumPy arrays.

They are read, and not written: an array is a part of the pickle.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bnguard.checkpoint.formats import OpenCheckpoint
from bnguard.checkpoint.storage import OpenFiles, Patch
from bnguard.checkpoint.unpickling import read_pickle
from bnguard.errors import CheckpointError

_PROTO = 0x80
_PROTOCOLS = range(2, 6)


class PlainPickle(OpenCheckpoint):
    """``pickle.dump``."""

    format = "pickle"

    def __init__(self, path: Path, files: OpenFiles) -> None:
        super().__init__(path, files)
        source = self.open_file(path)
        self.root = read_pickle(source, source.stream())

    @classmethod
    def recognises(cls, path: Path, start: bytes) -> bool:
        """Return whether a file begins with the number of a protocol."""
        return len(start) > 2 and start[0] == _PROTO and start[1] in _PROTOCOLS

    def copy(self, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Refuse: nothing in the file can be replaced."""
        raise CheckpointError(f"{self.path}: a plain pickle is not written; save it by torch.save")
