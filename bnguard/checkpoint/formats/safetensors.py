"""safetensors: a header in JSON, then the bytes of the tensors; nothing in it can be executed.

The format is so simple that the package of the same name is not needed:
eight bytes for the length of the header, the header, the data.
"""

from __future__ import annotations

import itertools
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bnguard.checkpoint.contents import Contents, parse_provenance
from bnguard.checkpoint.files import Patch, Source, first_bytes, open_source, patched, write_all
from bnguard.checkpoint.formats.base import Format
from bnguard.checkpoint.stored_tensors import CARRIERS, PlainStorage, StoredTensor, carrier
from bnguard.checkpoint.unpickling import damaged

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_PROVENANCE = "bnguard"
_ALIGNMENT = 8
# Some 200,000 tensors; JSON of a hostile file may take twenty times this in memory.
_LARGEST_HEADER_BYTES = 2**25

_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
}


class Safetensors(Format):
    """A file of the safetensors format."""

    name = "safetensors"

    def recognises(self, path: Path) -> bool:
        """Whether the file begins with a plausible length and the brace of a header."""
        start = first_bytes(path, _LENGTH.size + 1)
        if len(start) <= _LENGTH.size or start[_LENGTH.size :] != b"{":
            return False
        return bool(_LENGTH.unpack_from(start)[0] < path.stat().st_size)

    @contextmanager
    def open(self, path: Path) -> Iterator[Contents]:
        """Open a file of this format."""
        with open_source(path) as source:
            header, data = _read_header(source)
            metadata = _metadata(header)
            note = metadata.get(_PROVENANCE)
            yield Contents(
                path=path,
                format=self.name,
                root=_tensors(path, header, data),
                extras={
                    f"metadata {name}": value
                    for name, value in metadata.items()
                    if name not in (_PROVENANCE, "format")
                },
                provenance=None if note is None else parse_provenance(str(note)),
            )

    def copy(self, path: Path, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the data byte for byte behind a header that has the note in its metadata."""
        with open_source(path) as source, target.open("wb") as handle:
            header, data = _read_header(source)
            # transformers takes a file without metadata for torch's, one whose metadata names no
            # format for nobody's.
            metadata = dict(_metadata(header)) or {"format": "pt"}
            metadata[_PROVENANCE] = provenance
            rest = {name: value for name, value in header.items() if name != _METADATA}
            text = json.dumps({_METADATA: metadata} | rest, separators=(",", ":")).encode()
            text += b" " * (-len(text) % _ALIGNMENT)
            handle.write(_LENGTH.pack(len(text)) + text)
            write_all(handle, patched(data, patches))


def _read_header(source: Source) -> tuple[Mapping[str, object], Source]:
    """Return the header, and the bytes of the tensors."""
    (size,) = _LENGTH.unpack(source.read(0, _LENGTH.size))
    if size > _LARGEST_HEADER_BYTES:
        raise damaged(source.path, "its header is too long")
    try:
        header = json.loads(source.read(_LENGTH.size, size))
    except (ValueError, RecursionError) as error:
        raise damaged(source.path, "its header is no JSON") from error
    if not isinstance(header, dict):
        raise damaged(source.path, "its header is no object")
    start = _LENGTH.size + size
    return header, source.window(start, source.size - start)


def _metadata(header: Mapping[str, object]) -> Mapping[str, object]:
    metadata = header.get(_METADATA)
    return metadata if isinstance(metadata, dict) else {}


def _tensors(path: Path, header: Mapping[str, object], data: Source) -> dict[str, StoredTensor]:
    tensors = {
        name: _tensor(path, name, description, data)
        for name, description in header.items()
        if name != _METADATA
    }
    places = [piece.storage.source for tensor in tensors.values() for piece in tensor.pieces]
    places.sort(key=lambda place: (place.start, place.size))
    if any(low.start + low.size > high.start for low, high in itertools.pairwise(places)):
        raise damaged(path, "its tensors overlap")
    return tensors


def _tensor(path: Path, name: str, description: object, data: Source) -> StoredTensor:
    try:
        assert isinstance(description, dict)
        first, stop = description["data_offsets"]
        shape = tuple(description["shape"])
        written = description["dtype"]
        dtype = _DTYPES.get(written, written)
        is_valid = all(type(value) is int and value >= 0 for value in (first, stop, *shape))
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"its header does not describe {name}") from error
    if not is_valid or not isinstance(dtype, str):
        raise damaged(path, f"its header does not describe {name}")
    tensor = StoredTensor.viewing(
        PlainStorage(stop - first, "little", data.window(first, stop - first)), dtype, shape
    )
    if dtype in CARRIERS and tensor.numel * carrier(dtype).itemsize != stop - first:
        raise damaged(path, f"the size of {name} does not fit its shape")
    return tensor
