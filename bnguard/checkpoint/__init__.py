"""Checkpoints: read safely without model code, compared, and written with BN statistics replaced.

Reading imports no torch, so that an inspection answers at once; writing and loading do.

All of it raises :class:`~bnguard.errors.CheckpointError` for a file that is missing, damaged, of an
unknown format, or larger than any model, and for one that cannot be written.
"""

from __future__ import annotations

from bnguard.checkpoint.atomic_writing import check_backup, check_output, original_of
from bnguard.checkpoint.comparing import (
    CheckpointDifference,
    EntryDifference,
    LayerDifference,
    compare,
)
from bnguard.checkpoint.formats import OpenCheckpoint, register_format
from bnguard.checkpoint.reading import (
    find_checkpoints,
    load_state_dict,
    name_beside,
    read_checkpoint,
)
from bnguard.checkpoint.result import Checkpoint, CheckpointLayer, CheckpointModel
from bnguard.checkpoint.storage import StoredTensor
from bnguard.checkpoint.writing import (
    file_states,
    loading_code,
    replace_statistics,
    write_model,
    write_statistics,
)

__all__ = [
    "Checkpoint",
    "CheckpointDifference",
    "CheckpointLayer",
    "CheckpointModel",
    "EntryDifference",
    "LayerDifference",
    "OpenCheckpoint",
    "StoredTensor",
    "check_backup",
    "check_output",
    "compare",
    "file_states",
    "find_checkpoints",
    "load_state_dict",
    "loading_code",
    "name_beside",
    "original_of",
    "read_checkpoint",
    "register_format",
    "replace_statistics",
    "write_model",
    "write_statistics",
]
