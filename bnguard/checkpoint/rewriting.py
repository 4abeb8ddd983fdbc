"""Writing a checkpoint with other running statistics: next to the original, whole or not at all.

New statistics become patches, the bytes that change in the files; all else is copied as it is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnguard import __version__
from bnguard.checkpoint import atomic_writing as publishing
from bnguard.checkpoint.atomic_writing import (
    backup_of,
    check_backup,
    check_output,
    original_of,
    temporary_beside,
    write_errors,
)
from bnguard.checkpoint.bn_entries import STATISTICS, attribute_of
from bnguard.checkpoint.contents import Contents, Entry, entries
from bnguard.checkpoint.files import Patch, open_source
from bnguard.checkpoint.formats import checkpoint_at, format_of
from bnguard.checkpoint.reading import open_contents
from bnguard.checkpoint.stored_tensors import (
    FLOATING,
    NumpyStorage,
    Piece,
    StoredTensor,
    carrier,
    torch_dtype,
)
from bnguard.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


def write_statistics(
    source: str | Path,
    output: str | Path,
    statistics: Mapping[str, Tensor],
    provenance: Mapping[str, object],
    *,
    force: bool = False,
) -> Path:
    """Write a copy of a checkpoint in which some running statistics are replaced.

    Everything else is bit-identical, in the same format, and loads as before. The copy has its
    name when it is complete and on the disk, or not at all.

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
        CheckpointError: An entry does not exist, is no running statistic or does not fit; the
            output exists; it cannot be written. The original is untouched.
    """
    source, output = checkpoint_at(source), Path(output)
    check_output(output, source, is_folder=source.is_dir(), force=force)
    with _copy(source, output, statistics, provenance) as copy:
        if force and output.exists():
            publishing.replace(copy, output)
        else:
            publishing.publish(copy, output)
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
        path: The checkpoint. Where it is a link, the file that it leads to is replaced.
        statistics: As for :func:`write_statistics`.
        provenance: As for :func:`write_statistics`.
        force: Whether an existing backup is replaced.

    Returns:
        The backup, ``NAME.SUFFIX.bak``.

    Raises:
        CheckpointError: As for :func:`write_statistics`; or the backup exists.
    """
    original = original_of(path)
    backup = backup_of(original)
    check_backup(original, force=force)
    with _copy(original, original, statistics, provenance) as copy:
        publishing.replace_with_backup(copy, original, backup)
    return backup


def statistics_patches(contents: Contents, statistics: Mapping[str, Tensor]) -> tuple[Patch, ...]:
    """Return the patches that put new running statistics into an opened checkpoint.

    Tensors may view one storage with others. Two names of the same running statistic change
    together, as they would in memory; where anything else lies in the bytes that change, nothing
    is changed.

    Raises:
        CheckpointError: An entry does not exist or is no running statistic, a new tensor does not
            fit, or it would change another entry too.
    """
    if not statistics:
        raise CheckpointError(f"{contents.path}: there are no statistics to write into it")
    stored = _tensors(contents)
    changes = []
    for key, tensor in statistics.items():
        target = _target(contents, stored, key)
        values = _values(contents, key, target, tensor)
        changes += [_Change(key, target, piece, values) for piece in target.pieces]
    _check_neighbours(contents, stored, changes)
    return tuple(_patch(group) for group in _overlapping(changes))


@dataclass(frozen=True, eq=False)
class _Change:
    """A piece of a tensor that gets new elements.

    Attributes:
        key: Name of the entry.
        tensor: The tensor.
        piece: The piece.
        values: New elements of the whole tensor, in the type that carries them.
    """

    key: str
    tensor: StoredTensor
    piece: Piece
    values: npt.NDArray[Any]

    @property
    def span(self) -> tuple[int, int]:
        """First byte in the storage, and the one behind the last."""
        return self.tensor.byte_span(self.piece)

    @property
    def new_elements(self) -> npt.NDArray[Any]:
        """New elements of the piece."""
        corner, shape = self.piece.corner, self.piece.shape
        block = tuple(slice(c, c + s) for c, s in zip(corner, shape, strict=True))
        return np.asarray(self.values[block])


def _tensors(contents: Contents) -> dict[str, list[Entry]]:
    stored: dict[str, list[Entry]] = {}
    for entry in entries(contents):
        if isinstance(entry.value, StoredTensor):
            stored.setdefault(entry.key, []).append(entry)
    return stored


def _target(contents: Contents, stored: Mapping[str, Sequence[Entry]], key: str) -> StoredTensor:
    if attribute_of(key) not in STATISTICS:
        raise CheckpointError(
            f"{contents.path}: {key!r} is no running statistic; bnguard changes nothing else"
        )
    found = stored.get(key, ())
    if len(found) != 1:
        state = "holds several entries" if found else "has no entry"
        raise CheckpointError(f"{contents.path}: {state} {key!r}; name an entry of the checkpoint")
    target = found[0].value
    assert isinstance(target, StoredTensor)
    if any(isinstance(piece.storage, NumpyStorage) for piece in target.pieces):
        raise CheckpointError(
            f"{contents.path}: {key!r} is a NumPy array, which bnguard reads and does not change; "
            "save {k: torch.as_tensor(v) for k, v in state.items()}"
        )
    if target.is_meta:
        raise CheckpointError(
            f"{contents.path}: {key!r} was saved on the meta device and has no values to replace"
        )
    return target


def _values(contents: Contents, key: str, target: StoredTensor, tensor: Tensor) -> npt.NDArray[Any]:
    """Return the elements of a new tensor in the type that carries those of the stored one."""
    import torch

    if tuple(tensor.shape) != target.shape:
        raise CheckpointError(
            f"{contents.path}: {key!r} has shape {target.shape}, its new value "
            f"{tuple(tensor.shape)}"
        )
    new = tensor.detach().to("cpu", torch_dtype(target.dtype))
    is_overflow = target.dtype in FLOATING and bool(
        (torch.isinf(new) & torch.isfinite(tensor.detach().cpu())).any()
    )
    if is_overflow:
        raise CheckpointError(
            f"{contents.path}: the new {key!r} is too large for {target.dtype}, the type that "
            "the checkpoint stores it in; save the model in float32"
        )
    raw = new.reshape(-1).contiguous().view(torch.uint8)
    return np.frombuffer(raw.numpy().tobytes(), carrier(target.dtype)).reshape(target.shape)


def _check_neighbours(
    contents: Contents, stored: Mapping[str, Sequence[Entry]], changes: Sequence[_Change]
) -> None:
    """Refuse to change bytes that another entry views too."""
    by_storage: dict[int, list[_Change]] = {}
    for change in changes:
        positions = _positions(change.tensor, change.piece)
        if np.unique(positions).size != positions.size:
            raise _shares_bytes(contents, change.key, "itself: it was saved expanded")
        by_storage.setdefault(id(change.piece.storage), []).append(change)
    for entry in (entry for group in stored.values() for entry in group):
        assert isinstance(entry.value, StoredTensor)
        for piece in entry.value.pieces:
            for change in by_storage.get(id(piece.storage), ()):
                if not _is_harmless(change, entry, entry.value, piece, changes):
                    raise _shares_bytes(contents, change.key, repr(entry.key))


def _is_harmless(
    change: _Change,
    entry: Entry,
    tensor: StoredTensor,
    piece: Piece,
    changes: Sequence[_Change],
) -> bool:
    """Whether an entry has no byte in common with a change, or is the same running statistic."""
    low, high = change.span
    first, stop = tensor.byte_span(piece)
    if stop <= low or high <= first:
        return True
    is_same = (tensor.dtype, piece.start, piece.shape, piece.stride) == (
        change.tensor.dtype,
        change.piece.start,
        change.piece.shape,
        change.piece.stride,
    )
    if is_same and attribute_of(entry.key) == attribute_of(change.key):
        others = [c for c in changes if c.key == entry.key and c.piece.storage is piece.storage]
        return all(np.array_equal(c.values, change.values, equal_nan=True) for c in others)
    positions = _positions(change.tensor, change.piece)
    if piece.is_contiguous:
        return not bool(((first <= positions) & (positions < stop)).any())
    return np.intersect1d(positions, _positions(tensor, piece)).size == 0


def _positions(tensor: StoredTensor, piece: Piece) -> npt.NDArray[np.int64]:
    """Return the bytes of a piece, counted from the beginning of its storage."""
    first, stop = tensor.byte_span(piece)
    itemsize = carrier(tensor.dtype).itemsize
    indices = np.arange(stop - first, dtype=np.int64) + first
    window = indices.reshape(-1, itemsize)
    strides = tuple(step * itemsize * indices.itemsize for step in piece.stride)
    view = np.lib.stride_tricks.as_strided(
        window, (*piece.shape, itemsize), (*strides, indices.itemsize), writeable=False
    )
    return np.asarray(view.reshape(-1))


def _shares_bytes(contents: Contents, key: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{contents.path}: {key!r} shares its bytes with {other}, which must not change; "
        "save clones of the tensors"
    )


def _overlapping(changes: Iterable[_Change]) -> list[list[_Change]]:
    """Return the changes in groups whose spans interleave, so that each is patched at once."""
    groups: list[list[_Change]] = []
    reach, storage = 0, None
    for change in sorted(changes, key=lambda c: (id(c.piece.storage), c.span)):
        low, high = change.span
        if groups and change.piece.storage is storage and low < reach:
            groups[-1].append(change)
            reach = max(reach, high)
        else:
            groups.append([change])
            reach, storage = high, change.piece.storage
    return groups


def _patch(group: Sequence[_Change]) -> Patch:
    low = min(change.span[0] for change in group)
    high = max(change.span[1] for change in group)
    source = group[0].piece.storage.source
    data = bytearray(source.read(low, high - low))
    for change in group:
        code = carrier(change.tensor.dtype, change.piece.storage.byteorder)
        strides = tuple(step * code.itemsize for step in change.piece.stride)
        view: npt.NDArray[Any] = np.ndarray(
            change.piece.shape, code, data, change.span[0] - low, strides
        )
        view[...] = change.new_elements
    return Patch(source.path, source.start + low, bytes(data))


@contextmanager
def _copy(
    source: Path,
    output: Path,
    statistics: Mapping[str, Tensor],
    provenance: Mapping[str, object],
) -> Iterator[Path]:
    """Write a complete copy under a temporary name; where it keeps that, it is removed."""
    with open_contents(source) as contents:
        patches = statistics_patches(contents, statistics)
        note = {
            **provenance,
            "bnguard_version": __version__,
            "replaced": list(statistics),
            "original": _original(source, {patch.path for patch in patches}),
        }
        if contents.provenance is not None:
            note["previous"] = contents.provenance
    before = _states(source)
    with write_errors(output), temporary_beside(output, like=source) as copy:
        format_of(source).copy(source, copy, patches, _as_json(note))
        if _states(source) != before:
            raise CheckpointError(f"{source}: changed while it was copied; try again")
        publishing.settle(copy, source)
        yield copy


def _original(source: Path, changed: set[Path]) -> dict[str, object]:
    """Return name and SHA-256 of the original; of a folder those of the files that change."""
    if source.is_file():
        return {"name": source.name, "sha256": _sha256(source)}
    return {"name": source.name, "sha256": {p.name: _sha256(p) for p in sorted(changed)}}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open_source(path) as source:
        for chunk in source.chunks(0, source.size):
            digest.update(chunk)
    return digest.hexdigest()


def _states(source: Path) -> list[tuple[int, int, int]]:
    """Return what tells whether a file, or one in a folder, was written in the meantime."""
    files = sorted(source.rglob("*")) if source.is_dir() else [source]
    states = [path.stat() for path in files if path.exists()]
    return [(state.st_ino, state.st_size, state.st_mtime_ns) for state in states]


def _as_json(note: Mapping[str, object]) -> str:
    try:
        return json.dumps(note)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the provenance is no plain data: {error}") from error
