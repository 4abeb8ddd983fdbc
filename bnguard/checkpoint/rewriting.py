"""Writing a checkpoint with other running statistics: beside the original, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from bnguard.checkpoint import atomic_writing as publishing
from bnguard.checkpoint.atomic_writing import temporary_beside, write_errors
from bnguard.checkpoint.files import open_source
from bnguard.checkpoint.formats import checkpoint_at, format_of
from bnguard.checkpoint.outputs import backup_of, check_backup, check_output, original_of
from bnguard.checkpoint.reading import open_contents
from bnguard.checkpoint.replacing import statistics_patches
from bnguard.errors import CheckpointError
from bnguard.version import __version__

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
