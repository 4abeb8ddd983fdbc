"""Writes statistics, channels and findings into event files, as the tab reads them.

Tensors go through the file writer of the user's summary writer: this needs no TensorFlow and no
second event file, and the protocol buffers are those of the writer's own package. Viewers without
the tab get the findings as Markdown.
"""

from __future__ import annotations

import html
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bnguard.findings import FindingGroup
from bnguard.layers.distances import FloatArray, log_variance_ratio, shift_std
from bnguard.tensorboard.metadata import (
    CHANNEL_ROWS,
    CHANNELS_TAG,
    FINDINGS_TAG,
    PLUGIN_NAME,
    STATS_TAG,
    Header,
    Metric,
    encode_rows,
)
from bnguard.tensorboard.records import (
    as_findings,
    encode_findings,
    finding_record,
    group_causes,
)


class BatchNormLog:
    """Writes the log of one run: the statistics of every logged step, findings, channels.

    Args:
        writer: A ``SummaryWriter`` of torch or tensorboardX.
        layers: Names of the layers in forward order.
        metrics: The rows of the statistics; see ``metadata.standard_metrics``.
        kinds: Class name of each layer, to compare runs with other norms.
    """

    def __init__(
        self,
        writer: object,
        layers: Sequence[str],
        metrics: Sequence[Metric],
        kinds: Sequence[str] = (),
    ) -> None:
        self._writer = writer
        self._sink = EventSink(writer)
        self._header = Header(layers=tuple(layers), metrics=tuple(metrics), kinds=tuple(kinds))
        self._content = self._header.encode()
        self._last_step: int | None = None
        self._last_findings = encode_findings([])

    def add_stats(self, values: npt.ArrayLike, step: int) -> None:
        """Write one number per metric and layer, unless this step has been written.

        Args:
            values: Shape ``(metrics, layers)``; NaN if not observed.
            step: Training step.

        Raises:
            ValueError: The shape does not match the header.
        """
        # With gradient accumulation a step is logged once per micro-batch.
        if step != self._last_step:
            self.replace_stats(values, step)

    def replace_stats(self, values: npt.ArrayLike, step: int) -> None:
        """Write the numbers of a step, as an evaluation after it changed them."""
        tensor = np.asarray(values, dtype=np.float32)
        if tensor.shape != self._header.shape:
            raise ValueError(
                f"statistics have shape {tensor.shape}, and {self._header.shape} was announced"
            )
        self._last_step = step
        self._sink.add_array(STATS_TAG, tensor, step, self._content)

    def add_findings(self, findings: Iterable[Mapping[str, Any]], step: int) -> None:
        """Write all findings so far if they changed, as Markdown text too.

        Args:
            findings: Records as in :mod:`bnguard.tensorboard.records`; what ``Finding.to_dict``
                returns will do.
            step: Training step.
        """
        records = list(findings)
        text = encode_findings(records)
        if text == self._last_findings:
            return
        self._last_findings = text
        self._sink.add_string(FINDINGS_TAG, text, step)
        add_text = getattr(self._writer, "add_text", None)
        if add_text is not None:
            add_text(FINDINGS_TAG, findings_markdown(records), step)

    def add_channels(self, layer: str, snapshot: ChannelSnapshot, step: int) -> None:
        """Write the channel snapshot of a layer."""
        self._sink.add_array(CHANNELS_TAG + layer, snapshot.rows(), step, encode_rows(CHANNEL_ROWS))


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelSnapshot:
    """The statistics of each channel of a layer at one step; arrays have shape ``(C,)``.

    Attributes:
        running_mean: Running mean.
        running_var: Running variance.
        batch_mean: Mean of the training batch; None if not observed, as for the others.
        batch_var: Variance of the training batch.
        eval_mean: Mean of the inputs in eval mode.
        eval_var: Variance of the inputs in eval mode.
        gamma: Scale; None without affine parameters.
        beta: Offset.
        is_dead: Channels without variance; None for those whose running variance is not above
            ``eps``.
        eps: Added to a variance before the square root.
    """

    running_mean: FloatArray
    running_var: FloatArray
    batch_mean: FloatArray | None = None
    batch_var: FloatArray | None = None
    eval_mean: FloatArray | None = None
    eval_var: FloatArray | None = None
    gamma: FloatArray | None = None
    beta: FloatArray | None = None
    is_dead: npt.NDArray[np.bool_] | None = None
    eps: float = 1e-5

    def rows(self) -> npt.NDArray[np.float16]:
        """Return the snapshot as it is stored: ``CHANNEL_ROWS`` by channels, float16."""
        mean, var = (np.asarray(a, np.float64) for a in (self.running_mean, self.running_var))
        unknown = np.full(mean.shape, np.nan)

        def shift(other: FloatArray | None) -> FloatArray:
            return shift_std(unknown if other is None else other, mean, var, self.eps)

        def ratio(other: FloatArray | None) -> FloatArray:
            return log_variance_ratio(unknown if other is None else other, var, self.eps)

        # Poisoned statistics give NaN and overflowing ones Inf: both are meant to be seen.
        with np.errstate(all="ignore"):
            rows = {
                "batch_shift_std": shift(self.batch_mean),
                "batch_log_variance_ratio": ratio(self.batch_var),
                "eval_shift_std": shift(self.eval_mean),
                "eval_log_variance_ratio": ratio(self.eval_var),
                "running_mean": mean,
                "running_std": np.sqrt(var + self.eps),
                "gamma": np.ones_like(unknown) if self.gamma is None else self.gamma,
                "beta": np.zeros_like(unknown) if self.beta is None else self.beta,
                "is_dead": var <= self.eps if self.is_dead is None else self.is_dead,
            }
            return np.stack([rows[name] for name in CHANNEL_ROWS]).astype(np.float16)


def findings_markdown(findings: Iterable[Mapping[str, Any]]) -> str:
    """Return findings as a Markdown list, an item per root cause; their text is escaped.

    >>> print(findings_markdown([]))
    No problems found.
    """
    causes = group_causes(as_findings(map(finding_record, findings)))
    lines = (line for root, effects in causes.items() for line in _item(root, effects))
    return "\n".join(lines) if causes else "No problems found."


def _item(root: FindingGroup, effects: Iterable[FindingGroup]) -> Iterator[str]:
    worst = root.worst
    since = "" if root.step is None else f", since step {root.step}"
    yield f"- **{worst.severity}: {_escape(worst.message or worst.name)}**"
    yield f"    - {_escape(f'{worst.code} {worst.name} at {root.where}{since}')}"
    if worst.evidence.measure:
        yield f"    - {_escape(str(worst.evidence))}"
    codes = dict.fromkeys(effect.worst.code for effect in effects)
    if codes:
        yield f"    - leads to {_escape(', '.join(codes))}"
    for step in (worst.fix.summary, worst.fix.repair):
        if step:
            yield f"    - → {_escape(step)}"


def _escape(text: str) -> str:
    """Escape Markdown and HTML: names come from anywhere."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{char}" if char in r"\`*_[]|#" else char for char in escaped)


_DT_STRING = 7
_DT_OF = {"float32": 1, "float16": 19}

# Field 4 of SummaryMetadata, data_class, set to DATA_CLASS_TENSOR. The class of some writers lacks
# the field; without it TensorBoard's readers ignore the data.
_DATA_CLASS_TENSOR = b"\x20\x02"


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
        # After close() a writer has no file writer until it is asked for one.
        file_writer = getattr(self._writer, "_get_file_writer", lambda: None)()
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


def _summary_class(file_writer: object) -> Any:
    package = type(file_writer).__module__.partition(".")[0]
    protos = "tensorboardX.proto" if package == "tensorboardX" else "tensorboard.compat.proto"
    return importlib.import_module(f"{protos}.summary_pb2").Summary
