"""safetensors: a header in JSON, then the bytes of the tensors; nothing in it can be executed.

The format is so simple that the package of the same name is not needed:
eight bytes for the length of the header, the header, the data.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from bnguard.checkpoint.formats import OpenCheckpoint, parse_provenance
from bnguard.checkpoint.storage import CARRIERS, OpenFiles, Patch, Source, StoredTensor, carrier
from bnguard.checkpoint.unpickling import as_sizes, damaged

_LENGTH_BYTES = 8
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


class Safetensors(OpenCheckpoint):
    """A file of the safetensors format."""

    format = "safetensors"
    endings = (".safetensors",)

    def __init__(self, path: Path, files: OpenFiles) -> None:
        super().__init__(path, files)
        self._header, self._data = _read_header(self.open_file(path))
        metadata = self._header.pop(_METADATA, None)
        self._metadata = metadata if isinstance(metadata, dict) else {}
        tensors = {
            name: _tensor(name, description, self._data)
            for name, description in self._header.items()
        }
        places = [tensor.pieces[0].storage.find_source() for tensor in tensors.values()]
        spans = sorted((place.start, place.start + place.size) for place in places)
        if any(stop > start for (_, stop), (start, _) in itertools.pairwise(spans)):
            raise damaged(path, "its tensors overlap")
        self.root = tensors
        self.extras = {
            f"metadata {name}": value
            for name, value in self._metadata.items()
            if name not in (_PROVENANCE, "format")
        }
        if _PROVENANCE in self._metadata:
            self.provenance = parse_provenance(str(self._metadata[_PROVENANCE]))

    @classmethod
    def recognises(cls, path: Path, start: bytes) -> bool:
        """Return whether a file begins with a plausible length and the brace of a header."""
        size = int.from_bytes(start[:_LENGTH_BYTES], "little")
        return start[_LENGTH_BYTES:].startswith(b"{") and size < path.stat().st_size

    def copy(self, target: Path, patches: Sequence[Patch], provenance: str) -> None:
        """Copy the data byte for byte, behind a header with the note in its metadata."""
        # transformers takes a file without metadata for torch's, and refuses one whose metadata
        # do not name a format.
        metadata = {**(self._metadata or {"format": "pt"}), _PROVENANCE: provenance}
        header = {_METADATA: metadata, **self._header}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        with target.open("wb") as handle:
            handle.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            handle.writelines(self._data.patched(patches))


def _read_header(source: Source) -> tuple[dict[str, object], Source]:
    """Return the header, and the bytes of the tensors."""
    size = int.from_bytes(source.read(0, _LENGTH_BYTES), "little")
    if size > _LARGEST_HEADER_BYTES:
        raise damaged(source.path, "its header is too long")
    try:
        header = json.loads(source.read(_LENGTH_BYTES, size))
    except (ValueError, RecursionError) as error:
        raise damaged(source.path, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise damaged(source.path, "its header is not an object")
    start = _LENGTH_BYTES + size
    return header, source.window(start, source.size - start)


def _tensor(name: str, description: object, data: Source) -> StoredTensor:
    match description:
        case {"dtype": str(written), "shape": shape, "data_offsets": [first, stop]}:
            dtype = _DTYPES.get(written, written)
        case _:
            raise damaged(data.path, f"its header does not describe {name}")
    try:
        sizes = as_sizes(shape)
        first, stop = as_sizes([first, stop])
    except ValueError as error:
        raise damaged(data.path, f"its header does not describe {name}") from error
    place = data.window(first, stop - first)
    tensor = StoredTensor.at(place, dtype, sizes)
    if dtype in CARRIERS and tensor.numel * carrier(dtype).itemsize != place.size:
        raise damaged(data.path, f"the size of {name} does not fit its shape")
    return tensor
