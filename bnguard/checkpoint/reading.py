"""Opening a checkpoint of whatever format, and reading its BN layers or one of its models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bnguard.checkpoint.bn_entries import describe, groups_by_model
from bnguard.checkpoint.contents import Contents, entries
from bnguard.checkpoint.dtypes import torch_dtype
from bnguard.checkpoint.formats import checkpoint_at, format_of
from bnguard.checkpoint.model import LIGHTNING_PREFIX, Checkpoint
from bnguard.checkpoint.stored_tensors import StoredTensor
from bnguard.errors import CheckpointError
from bnguard.layers.names import without_wrappers

if TYPE_CHECKING:
    from torch import Tensor

# What torch.optim.swa_utils.AveragedModel keeps beside the model that it wraps.
_AVERAGED_MODELS_OWN = "n_averaged"


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read the BN layers of a checkpoint, and what it says about its training.

    Nothing in the file is executed, and no class that it mentions is imported; torch is not
    imported either. Of the tensors, those of BN layers alone are read.

    Args:
        path: A file, or the folder of a sharded or distributed checkpoint.

    Raises:
        CheckpointError: It cannot be read, is damaged, or is of no format that bnguard knows.
    """
    with open_contents(checkpoint_at(path)) as contents:
        return describe(contents)


def load_state_dict(path: str | Path, model: str | None = None) -> dict[str, Tensor]:
    """Load the state dict of one model in a checkpoint, on the CPU, as safely as it is inspected.

    Keys are those of the model's own ``state_dict()``: what wrappers (``DataParallel``,
    ``torch.compile``) put before all of them is taken off, but for Lightning, which does so
    itself. Entries that are no tensors stay out.

    Args:
        path: A file, or the folder of a sharded or distributed checkpoint.
        model: Prefix of the model (:attr:`CheckpointModel.prefix`); not needed where the
            checkpoint has one, or is Lightning's.

    Raises:
        CheckpointError: It cannot be read, has no such model, or several to choose from.
    """
    with open_contents(checkpoint_at(path)) as contents:
        prefix = _chosen(contents, model)
        stored = {
            ".".join(entry.path[entry.home :]): entry.value
            for entry in entries(contents)
            if entry.prefix == prefix and isinstance(entry.value, StoredTensor)
        }
        loaded = {key: _load(value) for key, value in stored.items()}
        return loaded if contents.is_lightning else _without_common_wrappers(loaded)


@contextmanager
def open_contents(path: Path) -> Iterator[Contents]:
    """Open a checkpoint; tensors in it can be read until it is closed.

    Raises:
        CheckpointError: It cannot be read, is damaged, or is of no format that bnguard knows.
    """
    with format_of(path).open(path) as contents:
        yield contents


def _chosen(contents: Contents, model: str | None) -> str:
    prefixes = list(groups_by_model(contents))
    names = ", ".join(repr(prefix) for prefix in prefixes)
    if model is not None and model not in prefixes:
        raise CheckpointError(
            f"{contents.path}: has no model {model!r} with BN layers; it has {names or 'none'}"
        )
    if model is None and not prefixes:
        raise CheckpointError(f"{contents.path}: has no BN layers; nothing to do here")
    if model is not None:
        return model
    if contents.is_lightning and LIGHTNING_PREFIX in prefixes:
        return LIGHTNING_PREFIX
    if len(prefixes) > 1:
        raise CheckpointError(f"{contents.path}: has several models, {names}; name one of them")
    return prefixes[0]


def _load(tensor: StoredTensor) -> Tensor:
    import torch

    dtype = torch_dtype(tensor.dtype)
    if tensor.is_meta:
        return torch.empty(tensor.shape, dtype=dtype, device="meta")
    return torch.from_numpy(tensor.read()).view(dtype)


def _without_common_wrappers(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    wrapped = [key for key in state_dict if key != _AVERAGED_MODELS_OWN]
    depths = {key.count(".") - without_wrappers(key).count(".") for key in wrapped}
    if len(depths) != 1 or depths == {0}:
        return state_dict
    return {without_wrappers(key): state_dict[key] for key in wrapped}
