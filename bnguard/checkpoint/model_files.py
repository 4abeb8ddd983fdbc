"""Writing a new checkpoint, where so much has changed that nothing of the original can stay."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bnguard import __version__
from bnguard.checkpoint import atomic_writing as publishing
from bnguard.checkpoint.atomic_writing import check_output, temporary_beside, write_errors
from bnguard.checkpoint.bn_entries import LIGHTNING_PREFIX, Checkpoint
from bnguard.checkpoint.formats import format_of
from bnguard.checkpoint.reading import open_contents
from bnguard.checkpoint.unpickling import mapping_of
from bnguard.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS = ".safetensors"
_VERSION = "pytorch-lightning_version"


def write_model(
    original: Checkpoint,
    output: Path,
    state_dict: Mapping[str, Tensor],
    provenance: Mapping[str, object],
    *,
    force: bool = False,
) -> None:
    """Write the weights of a model, in a file like the one that it comes from.

    A name that ends in ``.safetensors`` makes a file of that format; any other one that PyTorch
    loads, with the weights under the keys that they had. Where the original is Lightning's, the
    hyper-parameters, the epoch and the step come along, so that a Trainer validates and tests with
    it; the states of optimizers, loops and callbacks do not.

    Args:
        original: The checkpoint that the model comes from.
        output: The file to write.
        state_dict: The weights.
        provenance: What was done, as plain data; the version of bnguard and the name of the
            original are added.
        force: Whether an existing output is replaced.

    Raises:
        CheckpointError: The output exists, or it cannot be written.
    """
    check_output(output, original.path, is_folder=False, force=force)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in state_dict.items()}
    note = {**provenance, "bnguard_version": __version__, "original": original.path.name}
    if original.provenance is not None:
        note["previous"] = original.provenance
    with (
        write_errors(output),
        temporary_beside(output, like=output) as bare,
        temporary_beside(output, like=output) as noted,
    ):
        if output.suffix == _SAFETENSORS:
            _save_safetensors(bare, tensors)
        else:
            _save(original, bare, tensors)
        format_of(bare).copy(bare, noted, (), json.dumps(note))
        publishing.settle(noted, _file_of(original.path))
        if output.exists():
            publishing.replace(noted, output)
        else:
            publishing.publish(noted, output)


def _file_of(path: Path) -> Path:
    """Return a checkpoint, or any file of one that is a folder."""
    return path if path.is_file() else next(file for file in path.rglob("*") if file.is_file())


def loading_code(original: Checkpoint, output: Path) -> str:
    """Return the Python expression that loads the state dict that was written."""
    if output.suffix == _SAFETENSORS:
        return f'safetensors.torch.load_file("{output}")'
    keys = "".join(f'["{key}"]' for key in _keys(original))
    return f'torch.load("{output}", weights_only=True){keys}'


def _save_safetensors(target: Path, tensors: Mapping[str, Tensor]) -> None:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise CheckpointError(
            f"a file that ends in {_SAFETENSORS} takes safetensors: pip install safetensors"
        ) from error
    # Not by save_file, which says nothing that could be told of a disk that is full.
    target.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _save(original: Checkpoint, target: Path, tensors: Mapping[str, Tensor]) -> None:
    keys = _keys(original)
    content: dict[str, object] = dict(tensors)
    for key in reversed(keys):
        content = {key: content}
    publishing.save({**content, **_of_lightning(original, keys)}, target)


def _keys(original: Checkpoint) -> list[str]:
    """Return the keys under which the original holds its weights; none for a bare state dict."""
    prefixes = [model.prefix for model in original.models]
    prefix = LIGHTNING_PREFIX if LIGHTNING_PREFIX in prefixes else prefixes[0]
    return prefix.split(".")[:-1]


def _of_lightning(original: Checkpoint, keys: list[str]) -> dict[str, object]:
    """Return what Lightning wants beside the weights."""
    if keys != LIGHTNING_PREFIX.split(".")[:-1]:
        return {}
    with open_contents(original.path) as contents:
        version = (mapping_of(contents.root) or {}).get(_VERSION)
    known = {
        _VERSION: version,
        "epoch": original.epoch,
        "global_step": original.global_step,
        "hyper_parameters": dict(original.hyper_parameters) or None,
    }
    return {name: value for name, value in known.items() if value is not None}
