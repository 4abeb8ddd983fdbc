"""Writing a checkpoint: with other running statistics and all else as it was, or as a new file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bnguard import __version__
from bnguard.checkpoint.atomic_writing import (
    backup_of,
    check_backup,
    check_output,
    original_of,
    publish,
    replace_with_backup,
    temporary_beside,
    write_errors,
)
from bnguard.checkpoint.patching import statistics_patches
from bnguard.checkpoint.reading import checkpoint_at, open_checkpoint
from bnguard.checkpoint.result import LIGHTNING_PREFIX, Checkpoint
from bnguard.checkpoint.unpickling import mapping_of
from bnguard.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from bnguard.checkpoint.storage import Source

_SAFETENSORS = ".safetensors"
_LIGHTNING_VERSION = "pytorch-lightning_version"


def write_statistics(
    source: str | Path,
    output: str | Path,
    statistics: Mapping[str, Tensor],
    provenance: Mapping[str, object],
    *,
    force: bool = False,
) -> Path:
    """Write a copy of a checkpoint in which some running statistics are replaced.

    Everything else is bit-identical, in the same format, and loads as before. The copy gets its
    name when it is complete and on the disk.

    Args:
        source: The checkpoint.
        output: Name of the copy.
        statistics: New tensors by the name of their entry (:meth:`CheckpointLayer.key`):
            ``running_mean``, ``running_var`` or ``num_batches_tracked``, in the shape that the
            checkpoint has; they are converted to its element type.
        provenance: What was done, as plain data. The version of bnguard, the names of the
            replaced entries, and the name and SHA-256 of the original are added.
        force: Whether an existing output is replaced.

    Returns:
        The output.

    Raises:
        CheckpointError: An entry does not exist, is not a running statistic or does not fit; the
            output exists; it cannot be written. The original is untouched.
    """
    source, output = checkpoint_at(source), Path(output)
    check_output(output, source, is_folder=source.is_dir(), force=force)
    with _copy(source, output, statistics, provenance) as copy:
        publish(copy, output, like=source, force=force)
    return output


def replace_statistics(
    path: str | Path,
    statistics: Mapping[str, Tensor],
    provenance: Mapping[str, object],
    *,
    force: bool = False,
) -> Path:
    """Replace running statistics of a checkpoint in place, and keep the original as a backup.

    Args:
        path: The checkpoint. The target of a link is replaced, not the link.
        statistics: As for :func:`write_statistics`.
        provenance: As for :func:`write_statistics`.
        force: Whether an existing backup is replaced.

    Returns:
        The backup, ``NAME.SUFFIX.bak``.

    Raises:
        CheckpointError: As for :func:`write_statistics`; or the backup exists.
    """
    original = original_of(path)
    check_backup(original, force=force)
    with _copy(original, original, statistics, provenance) as copy:
        replace_with_backup(copy, original)
    return backup_of(original)


@contextmanager
def _copy(
    source: Path,
    output: Path,
    statistics: Mapping[str, Tensor],
    provenance: Mapping[str, object],
) -> Iterator[Path]:
    """Write a complete copy under a temporary name; if it keeps that, it is removed."""
    before = file_states(source)
    with write_errors(output), temporary_beside(output, like=source) as copy:
        with open_checkpoint(source) as checkpoint:
            patches = statistics_patches(checkpoint, statistics)
            changed = sorted({patch.path for patch in patches})
            sums = {path.name: _sha256(checkpoint.open_file(path)) for path in changed}
            note = {
                **provenance,
                "bnguard_version": __version__,
                "replaced": list(statistics),
                "original": {
                    "name": source.name,
                    "sha256": sums if source.is_dir() else sums[source.name],
                },
            }
            if checkpoint.provenance is not None:
                note["previous"] = checkpoint.provenance
            checkpoint.copy(copy, patches, _as_json(note))
        if file_states(source) != before:
            raise CheckpointError(f"{source}: changed while it was copied; try again")
        yield copy


def _sha256(source: Source) -> str:
    digest = hashlib.sha256()
    for chunk in source.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def file_states(source: Path) -> list[tuple[int, int, int]]:
    """Return what differs once a checkpoint, a file or one in a folder, is written again."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    states = [path.stat() for path in files if path.exists()]
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]


def _as_json(note: Mapping[str, object]) -> str:
    try:
        return json.dumps(note)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the provenance is not plain data: {error}") from error


def write_model(
    original: Checkpoint,
    output: Path,
    state_dict: Mapping[str, Tensor],
    provenance: Mapping[str, object],
    *,
    force: bool = False,
) -> None:
    """Write the weights of a changed model in a new file like the one that it comes from.

    A name that ends in ``.safetensors`` makes a file of that format; any other one that PyTorch
    loads, with the weights under the keys that they had. If the original is Lightning's, the
    hyper-parameters, the epoch and the step are kept, so that a Trainer validates and tests with
    it; the states of optimizers, loops and callbacks are not.

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
    # Any file of a folder has the permissions that the new one gets.
    files = original.path.rglob("*") if original.path.is_dir() else [original.path]
    like = next(file for file in files if file.is_file())
    with (
        write_errors(output),
        temporary_beside(output, like=like) as bare,
        temporary_beside(output, like=like) as noted,
    ):
        if output.suffix == _SAFETENSORS:
            _save_safetensors(bare, tensors)
        else:
            _save(original, bare, tensors)
        with open_checkpoint(bare) as saved:
            saved.copy(noted, (), _as_json(note))
        publish(noted, output, like=like, force=force)


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
    # Not by save_file, whose error does not say that a disk is full.
    target.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _save(original: Checkpoint, target: Path, tensors: Mapping[str, Tensor]) -> None:
    import torch

    keys = _keys(original)
    content: dict[str, object] = dict(tensors)
    for key in reversed(keys):
        content = {key: content}
    if keys == LIGHTNING_PREFIX.split(".")[:-1]:
        with open_checkpoint(original.path) as opened:
            version = (mapping_of(opened.root) or {}).get(_LIGHTNING_VERSION)
        known = {
            _LIGHTNING_VERSION: version,
            "epoch": original.epoch,
            "global_step": original.global_step,
            "hyper_parameters": dict(original.hyper_parameters) or None,
        }
        content |= {name: value for name, value in known.items() if value is not None}
    try:
        with target.open("wb") as handle:
            torch.save(content, handle)
    except RuntimeError as error:
        # torch complains of the consequences of a failed write, or of Ctrl-C.
        if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
            raise error.__context__ from None
        raise


def _keys(original: Checkpoint) -> list[str]:
    """Return the keys under which the original holds its weights; none for a bare state dict."""
    prefixes = [model.prefix for model in original.models]
    prefix = LIGHTNING_PREFIX if LIGHTNING_PREFIX in prefixes else prefixes[0]
    return prefix.split(".")[:-1]
