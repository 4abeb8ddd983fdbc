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
from zipfile import ZipFile, ZipInfo

from bnguard.checkpoint.archive import (
    LOCAL_MAGIC,
    Archive,
    checksum_patches,
    is_stored,
    read_archive,
)
from bnguard.checkpoint.contents import LONGEST_PROVENANCE_BYTES, Contents, parse_provenance
from bnguard.checkpoint.files import Source, first_bytes, open_source
from bnguard.checkpoint.formats.base import Format
from bnguard.checkpoint.inert import TypedStorage, storage_dtype
from bnguard.checkpoint.patch import Patch, patched, write_all
from bnguard.checkpoint.stored_tensors import Storage, StoredTensor
from bnguard.checkpoint.unpickling import read_pickle
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
    record: ZipInfo

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
            last = max(record.header_offset for record in archive.records.values())
            if last > archive.directory_start:
                raise CheckpointError(
                    f"{path}: its archive has records behind its directory; "
                    "save the checkpoint again with torch.save"
                )
            name = archive_folder(archive) + _PROVENANCE
            write_all(handle, patched(source, [*patches, *checksum_patches(archive, patches)]))
        with ZipFile(target, "a") as copy:
            old_note = copy.NameToInfo.pop(name, None)
            if old_note is not None:
                copy.filelist.remove(old_note)
                if old_note.header_offset == last:
                    copy.start_dir = last
            copy.writestr(ZipInfo(name), provenance)


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
            known[name] = RecordStorage(record.file_size, order, archive, record)
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
    is_big = record is not None and record.file_size == 3
    return "big" if is_big else "little"


def _extras(archive: Archive, folder: str) -> Iterator[tuple[str, StoredTensor]]:
    for name, record in archive.records.items():
        short = name.removeprefix(folder)
        if short in _BOOKKEEPING or short in (_PICKLE, _PROVENANCE) or short.startswith("data/"):
            continue
        if is_stored(record):
            storage = RecordStorage(record.file_size, "little", archive, record)
            yield f"record {short}", StoredTensor.viewing(storage, "uint8", (record.file_size,))


def _provenance(archive: Archive, folder: str) -> Mapping[str, object] | None:
    record = archive.records.get(folder + _PROVENANCE)
    if record is None:
        return None
    content = archive.content(record)
    return parse_provenance(content.read(0, min(content.size, LONGEST_PROVENANCE_BYTES)))
