"""torch's zip files, as ``torch.save`` has written them since version 1.6, and TorchScript's.

A checkpoint is not loaded and saved again. The archive is copied byte for byte, the pickle
included; only the storages of the statistics, and their checksums, are replaced where they lie.
The note of how it came about is appended as a record of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bnguard.checkpoint.archive import LOCAL_MAGIC, Archive, Record, read_archive
from bnguard.checkpoint.contents import LONGEST_PROVENANCE_BYTES, Contents, parse_provenance
from bnguard.checkpoint.formats.base import Format
from bnguard.checkpoint.inert import TypedStorage, storage_dtype
from bnguard.checkpoint.patch import Patch, patched, write_all
from bnguard.checkpoint.pickles import read_pickle
from bnguard.checkpoint.rewriting import checksum_patches, end_of_directory, new_record
from bnguard.checkpoint.sources import Source, first_bytes, open_source
from bnguard.checkpoint.tensors import Storage, StoredTensor
from bnguard.errors import CheckpointError

_PICKLE = "data.pkl"
_PROVENANCE = "bnguard/provenance.json"
# What torch keeps for itself: nothing that a user saved.
_BOOKKEEPING = frozenset(
    {"version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id"}
)


@dataclass(frozen=True, eq=False)
class RecordStorage(Storage):
    """A storage that is a record of an archive."""

    archive: Archive
    record: Record

    @property
    def source(self) -> Source:
        """Where the bytes lie; told by the header of the record, which is read when asked for."""
        return self.archive.content(self.record)


class TorchZip(Format):
    """``torch.save`` since 1.6, Lightning's ``.ckpt``, and TorchScript."""

    name = "torch zip"

    def recognises(self, path: Path) -> bool:
        """Whether the file begins as an archive does."""
        return first_bytes(path, 4) == LOCAL_MAGIC

    @contextmanager
    def open(self, path: Path) -> Iterator[Contents]:
        """Open a file of this format."""
        with open_source(path) as source:
            archive = read_archive(source)
            folder = archive_folder(archive)
            yield Contents(
                path=path,
                format=self.name,
                root=read_object(archive, folder),
                extras=dict(_extras(archive, folder)),
                provenance=_provenance(archive, folder),
            )

    def copy(self, path: Path, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the archive byte for byte, and append the note to it."""
        with open_source(path) as source, target.open("wb") as handle:
            archive = read_archive(source)
            name = archive_folder(archive) + _PROVENANCE
            old_note = archive.records.get(name)
            changes = [*patches, *checksum_patches(archive, patches)]
            stop = _end_of_records(archive, old_note)
            record, entry = new_record(name, provenance.encode(), stop)
            write_all(handle, patched(source.window(0, stop), changes))
            handle.write(record)

            size = len(archive.directory)
            place = source.window(archive.directory_start, size)
            directory = bytearray(b"".join(patched(place, changes)))
            if old_note is not None:
                del directory[old_note.entry : old_note.entry + old_note.entry_size]
            count = len(archive.records) + (old_note is None)
            start = handle.tell()
            handle.write(directory + entry)
            handle.write(end_of_directory(count, len(directory) + len(entry), start))


def _end_of_records(archive: Archive, old_note: Record | None) -> int:
    """Return where the records end; an old note that is the last of them does not count."""
    last = max(record.header for record in archive.records.values())
    if last > archive.directory_start:
        raise CheckpointError(
            f"{archive.source.path}: its archive has records behind its directory; "
            "save the checkpoint again with torch.save"
        )
    return last if old_note is not None and old_note.header == last else archive.directory_start


def read_object(archive: Archive, folder: str) -> object:
    """Return what was saved in an archive whose records lie in ``folder``.

    Raises:
        CheckpointError: It is damaged.
    """
    source = archive.content(archive.records[folder + _PICKLE])
    return read_pickle(source, source.stream(), _storages(archive, folder))


def _storages(archive: Archive, folder: str) -> Callable[[tuple[object, ...]], TypedStorage]:
    known: dict[str, Storage] = {}
    order = _byteorder(archive, folder)

    def resolve(identifier: tuple[object, ...]) -> TypedStorage:
        kind, storage_type, name = identifier[:3]
        if kind != "storage" or not isinstance(name, str):
            raise ValueError("a persistent identifier that is no storage")
        if name not in known:
            record = archive.records.get(f"{folder}data/{name}")
            if record is None:
                raise ValueError(f"storage {name} is missing")
            known[name] = RecordStorage(record.size, order, archive, record)
        return TypedStorage(known[name], storage_dtype(storage_type))

    return resolve


def archive_folder(archive: Archive) -> str:
    """Return the folder that holds all records, with its slash.

    Raises:
        CheckpointError: torch did not write this archive.
    """
    pickles = [name for name in archive.records if name.endswith("/" + _PICKLE)]
    if not pickles:
        raise CheckpointError(
            f"{archive.source.path}: an archive without a pickle of torch; "
            "give a file that torch.save wrote"
        )
    return min(pickles, key=len).removesuffix(_PICKLE)


def _byteorder(archive: Archive, folder: str) -> str:
    record = archive.records.get(folder + "byteorder")
    is_big = record is not None and record.size == 3
    return "big" if is_big else "little"


def _extras(archive: Archive, folder: str) -> Iterator[tuple[str, StoredTensor]]:
    for name, record in archive.records.items():
        short = name.removeprefix(folder)
        if short in _BOOKKEEPING or short in (_PICKLE, _PROVENANCE) or short.startswith("data/"):
            continue
        if record.is_stored:
            storage = RecordStorage(record.size, "little", archive, record)
            yield f"record {short}", StoredTensor.viewing(storage, "uint8", (record.size,))


def _provenance(archive: Archive, folder: str) -> Mapping[str, object] | None:
    record = archive.records.get(folder + _PROVENANCE)
    if record is None:
        return None
    content = archive.content(record)
    return parse_provenance(content.read(0, min(content.size, LONGEST_PROVENANCE_BYTES)))
