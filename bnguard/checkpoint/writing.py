"""Writing a checkpoint: with other running statistics and all else as it was, or as a new file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnguard import __version__
from bnguard.checkpoint.atomic_writing import (
    backup_of,
    check_backup,
    check_output,
    original_of,
    publish,
    replace_with_backup,
    temporary_folder,
    write_errors,
)
from bnguard.checkpoint.bn_entries import STATISTICS
from bnguard.checkpoint.contents import entries
from bnguard.checkpoint.formats import OpenCheckpoint
from bnguard.checkpoint.reading import checkpoint_at, open_checkpoint
from bnguard.checkpoint.result import LIGHTNING_PREFIX, Checkpoint
from bnguard.checkpoint.storage import FLOATING, Patch, Piece, StoredTensor, carrier, torch_dtype
from bnguard.checkpoint.unpickling import mapping_of
from bnguard.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

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
    source: Path, output: Path, statistics: Mapping[str, Tensor], provenance: Mapping[str, object]
) -> Iterator[Path]:
    """Write a complete copy under a temporary name; if it keeps that, it is removed."""
    before = file_states(source)
    with write_errors(output), temporary_folder(output) as folder:
        copy = folder / "copy"
        with open_checkpoint(source) as checkpoint:
            patches = _statistics_patches(checkpoint, statistics)
            sums = {}
            for path in sorted({patch.path for patch in patches}):
                digest = hashlib.sha256()
                for chunk in checkpoint.open_file(path).chunks():
                    digest.update(chunk)
                sums[path.name] = digest.hexdigest()
            note = {
                "replaced": list(statistics),
                "original": {
                    "name": source.name,
                    "sha256": sums if source.is_dir() else sums[source.name],
                },
            }
            text = _note(provenance, note, previous=checkpoint.provenance)
            checkpoint.copy(copy, patches, text)
        if file_states(source) != before:
            raise CheckpointError(f"{source}: changed while it was copied; try again")
        yield copy


def file_states(source: Path) -> list[tuple[int, int, int]]:
    """Return what differs once a checkpoint, a file or one in a folder, is written again."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    states = [path.stat() for path in files if path.exists()]
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]


def _note(
    provenance: Mapping[str, object],
    more: Mapping[str, object],
    *,
    previous: Mapping[str, object] | None,
) -> str:
    """Return the provenance note as JSON."""
    note = {**provenance, "bnguard_version": __version__, **more}
    if previous is not None:
        note["previous"] = previous
    try:
        return json.dumps(note)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the provenance is not plain data: {error}") from error


def _statistics_patches(
    checkpoint: OpenCheckpoint, statistics: Mapping[str, Tensor]
) -> tuple[Patch, ...]:
    """Return the patches that put new running statistics into an open checkpoint.

    Tensors may view one storage with others. Two names of the same running statistic change
    together, as they would in memory; if any other entry views bytes that would change, it is an
    error.
    """
    if not statistics:
        raise CheckpointError(f"{checkpoint.path}: got no statistics to write")
    stored: dict[str, list[StoredTensor]] = {}
    for entry in entries(checkpoint):
        if isinstance(entry.value, StoredTensor):
            stored.setdefault(entry.key, []).append(entry.value)
    changes: list[_Change] = []
    for key, tensor in statistics.items():
        try:
            changes += _changes(key, stored.get(key, ()), tensor)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.path}: {error}") from error
    _check_neighbours(checkpoint, stored, changes)
    return tuple(patch for change in changes for patch in change.patches())


@dataclass(frozen=True, eq=False)
class _Change:
    """New elements of a piece of an entry, as bytes in the order of its shape."""

    key: str
    dtype: str
    piece: Piece
    data: bytes

    def patches(self) -> Iterator[Patch]:
        source = self.piece.storage.find_source()
        first, _ = self.piece.byte_span(self.dtype)
        if self.piece.is_contiguous:
            yield Patch(source.path, source.start + first, self.data)
            return
        size = carrier(self.dtype).itemsize
        for number, position in enumerate(_byte_positions(self.piece, self.dtype)[::size].tolist()):
            element = self.data[number * size : (number + 1) * size]
            yield Patch(source.path, source.start + position, element)

    def overlaps(self, dtype: str, piece: Piece) -> bool:
        """Return whether a piece of the same storage has a byte in common with this one."""
        low, high = self.piece.byte_span(self.dtype)
        first, stop = piece.byte_span(dtype)
        if stop <= low or high <= first:
            return False
        if math.prod(piece.shape) * carrier(dtype).itemsize > piece.storage.nbytes:  # expanded
            return True
        positions = _byte_positions(self.piece, self.dtype)
        if piece.is_contiguous:
            return bool(((first <= positions) & (positions < stop)).any())
        return np.intersect1d(positions, _byte_positions(piece, dtype)).size > 0

    def is_same_statistic(self, key: str, dtype: str, piece: Piece) -> bool:
        """Return whether an entry is another name of this running statistic."""
        own, other = self.piece, piece
        is_same = (own.start, own.shape, own.stride) == (other.start, other.shape, other.stride)
        return is_same and (_attribute(self.key), self.dtype) == (_attribute(key), dtype)


def _changes(key: str, found: Sequence[StoredTensor], tensor: Tensor) -> Iterator[_Change]:
    """Yield the changes of one entry; raise ``ValueError`` if it or the tensor does not fit."""
    if _attribute(key) not in STATISTICS:
        raise ValueError(f"{key!r} is not a running statistic; bnguard changes nothing else")
    if len(found) != 1:
        state = "holds several entries" if found else "has no entry"
        raise ValueError(f"{state} {key!r}; name an entry of the checkpoint")
    (target,) = found
    if not all(piece.storage.is_replaceable for piece in target.pieces):
        raise ValueError(
            f"{key!r} is a NumPy array, which bnguard reads but does not change; "
            "save {k: torch.as_tensor(v) for k, v in state.items()}"
        )
    if target.is_meta:
        raise ValueError(f"{key!r} was saved on the meta device and has no values to replace")
    if tuple(tensor.shape) != target.shape:
        shapes = f"{target.shape}, its new value {tuple(tensor.shape)}"
        raise ValueError(f"{key!r} has shape {shapes}")
    values = _elements(key, target.dtype, tensor)
    for piece in target.pieces:
        if np.unique(positions := _byte_positions(piece, target.dtype)).size != positions.size:
            raise ValueError(
                f"{key!r} shares its bytes with itself: it was saved expanded; "
                "save clones of the tensors"
            )
        block = tuple(slice(c, c + s) for c, s in zip(piece.corner, piece.shape, strict=True))
        data = np.asarray(values[block]).astype(piece.carrier(target.dtype)).tobytes()
        yield _Change(key, target.dtype, piece, data)


def _elements(key: str, dtype: str, tensor: Tensor) -> npt.NDArray[Any]:
    """Return the elements of a tensor in the type that carries those of a stored type."""
    import torch

    new = tensor.detach().to("cpu", torch_dtype(dtype))
    overflow = torch.isinf(new) & torch.isfinite(tensor.detach().cpu())
    if dtype in FLOATING and bool(overflow.any()):
        raise ValueError(
            f"the new {key!r} is too large for {dtype}, the type that the checkpoint stores it in; "
            "save the model in float32"
        )
    raw = new.reshape(-1).contiguous().view(torch.uint8)
    return np.frombuffer(raw.numpy().tobytes(), carrier(dtype)).reshape(new.shape)


def _check_neighbours(
    checkpoint: OpenCheckpoint,
    stored: Mapping[str, Sequence[StoredTensor]],
    changes: Sequence[_Change],
) -> None:
    """Refuse to change bytes that another entry views too."""
    by_storage: dict[int, list[_Change]] = {}
    for change in changes:
        by_storage.setdefault(id(change.piece.storage), []).append(change)
    tensors = ((key, tensor) for key, found in stored.items() for tensor in found)
    for key, dtype, piece in ((k, t.dtype, piece) for k, t in tensors for piece in t.pieces):
        inside = by_storage.get(id(piece.storage), ())
        for change in inside:
            if not change.overlaps(dtype, piece):
                continue
            contradictions = [c for c in inside if c.key == key and c.data != change.data]
            if contradictions or not change.is_same_statistic(key, dtype, piece):
                raise CheckpointError(
                    f"{checkpoint.path}: {change.key!r} shares its bytes with {key!r}, which must "
                    "not change; save clones of the tensors"
                )


def _attribute(key: str) -> str:
    return key.rpartition(".")[2]


def _byte_positions(piece: Piece, dtype: str) -> npt.NDArray[np.int64]:
    """Return the bytes of a piece, in the order of its elements, by position in its storage."""
    itemsize = carrier(dtype).itemsize
    indices = np.indices(piece.shape).reshape(len(piece.shape), math.prod(piece.shape))
    elements = piece.start + np.array(piece.stride, np.int64) @ indices
    return np.asarray((elements[:, None] * itemsize + np.arange(itemsize)).reshape(-1))


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
    # Any file of a folder has the permissions that the new one gets.
    files = original.path.rglob("*") if original.path.is_dir() else [original.path]
    like = next(file for file in files if file.is_file())
    with write_errors(output), temporary_folder(output) as folder:
        bare, noted = folder / "bare", folder / "noted"
        if output.suffix == _SAFETENSORS:
            _save_safetensors(bare, tensors)
        else:
            _save(original, bare, tensors)
        with open_checkpoint(bare) as saved:
            name = {"original": original.path.name}
            saved.copy(noted, (), _note(provenance, name, previous=original.provenance))
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
            "hyper_parameters": dict(original.hyper_parameters.values) or None,
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
