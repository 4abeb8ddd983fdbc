"""Names of element types as torch spells them, and how numpy carries their bytes.

numpy has no bfloat16 and no float8: their bytes travel in unsigned integers of the same width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bnguard.errors import CheckpointError
from bnguard.layers.distances import FloatArray

if TYPE_CHECKING:
    import torch

CARRIERS = {
    "bool": "?",
    "uint8": "u1",
    "int8": "i1",
    "int16": "i2",
    "int32": "i4",
    "int64": "i8",
    "uint16": "u2",
    "uint32": "u4",
    "uint64": "u8",
    "float16": "f2",
    "float32": "f4",
    "float64": "f8",
    "bfloat16": "u2",
    "float8_e4m3fn": "u1",
    "float8_e4m3fnuz": "u1",
    "float8_e5m2": "u1",
    "float8_e5m2fnuz": "u1",
    "float8_e8m0fnu": "u1",
    "complex32": "u4",
    "complex64": "c8",
    "complex128": "c16",
}
# The classes of torch's typed storages, whose names imply the type of the elements.
STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
FLOATING = frozenset({"float16", "bfloat16", "float32", "float64"})
INTEGER = frozenset(name for name, code in CARRIERS.items() if code[0] == "i" or name == "uint8")


def carrier(dtype: str, byteorder: str = "little") -> np.dtype[Any]:
    """Return the numpy type that carries the elements of a torch type.

    Raises:
        KeyError: No such type is known.

    >>> carrier("bfloat16").itemsize, carrier("float32").itemsize
    (2, 4)
    """
    return np.dtype(CARRIERS[dtype]).newbyteorder("<" if byteorder == "little" else ">")


def torch_dtype(name: str) -> torch.dtype:
    """Return the type of torch that has a name.

    Raises:
        CheckpointError: This version of torch has none.
    """
    import torch

    dtype = getattr(torch, name, None)
    if name not in CARRIERS or not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"a tensor is of type {name!a}, which torch {torch.__version__} lacks"
        )
    return dtype


def to_float64(carried: npt.NDArray[Any], dtype: str) -> FloatArray:
    """Return the values of elements read in their carrier type.

    >>> to_float64(np.array([0x3F80, 0xC000], dtype=np.uint16), "bfloat16").tolist()
    [1.0, -2.0]
    """
    if dtype == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        carried = (carried.astype(np.uint32) << 16).view(np.float32)
    # A signalling NaN is a NaN, and no reason for a warning.
    with np.errstate(invalid="ignore"):
        return carried.astype(np.float64)
