"""Writes tensors into event files through the file writer of the user's summary writer.

This needs no TensorFlow and no second event file: the protocol buffers are those of the writer's
own package.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bnguard.tensorboard.metadata import PLUGIN_NAME

_DT_STRING = 7
_DT_OF = {"float32": 1, "float16": 19}

# Field 4 of SummaryMetadata, data_class, set to DATA_CLASS_TENSOR. The class of some writers lacks
# the field; without it TensorBoard's readers ignore the data.
_DATA_CLASS_TENSOR = b"\x20\x02"


class _Summary(Protocol):
    """The protocol buffer ``Summary`` of any package."""

    value: Any


class _FileWriter(Protocol):
    """The writer of an event file."""

    def add_summary(self, summary: _Summary, global_step: int) -> object: ...


class EventSink:
    """Sends tensors to the event file of a ``SummaryWriter`` of torch or tensorboardX.

    Anything else, such as the placeholder that Lightning uses on other ranks, is ignored.
    """

    def __init__(self, writer: object) -> None:
        self._writer = writer
        self._described: set[str] = set()

    def add_array(
        self,
        tag: str,
        array: npt.NDArray[np.float32] | npt.NDArray[np.float16],
        step: int,
        description: bytes = b"",
    ) -> None:
        """Send an array; the first one of each tag carries the description."""
        data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        self._add(
            tag,
            {
                "dtype": _DT_OF[array.dtype.name],
                "tensor_shape": {"dim": [{"size": size} for size in data.shape]},
                "tensor_content": data.tobytes(),
            },
            step,
            description,
        )

    def add_string(self, tag: str, text: bytes, step: int) -> None:
        """Send a text as a tensor with one string."""
        self._add(tag, {"dtype": _DT_STRING, "string_val": [text]}, step, b"")

    def _add(self, tag: str, tensor: dict[str, Any], step: int, description: bytes) -> None:
        file_writer = _file_writer(self._writer)
        if file_writer is None:
            return
        summary_class = _summary_class(file_writer)
        value: dict[str, Any] = {"tag": tag, "tensor": tensor}
        if tag not in self._described:
            value["metadata"] = {
                "plugin_data": {"plugin_name": PLUGIN_NAME, "content": description}
            }
        summary = summary_class(value=[value])
        if tag not in self._described:
            summary.value[0].metadata.MergeFromString(_DATA_CLASS_TENSOR)
            self._described.add(tag)
        file_writer.add_summary(summary, step)


def _file_writer(writer: object) -> _FileWriter | None:
    # After close() a writer has no file writer until it is asked for one.
    get: Callable[[], _FileWriter | None] = getattr(writer, "_get_file_writer", lambda: None)
    return get()


def _summary_class(file_writer: _FileWriter) -> Callable[..., _Summary]:
    package = type(file_writer).__module__.partition(".")[0]
    protos = "tensorboardX.proto" if package == "tensorboardX" else "tensorboard.compat.proto"
    summary: Callable[..., _Summary] = importlib.import_module(f"{protos}.summary_pb2").Summary
    return summary
