"""Batch statistics of the few layers whose buffers do not tell them, from their inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnguard.layers import BatchNormLayer
from bnguard.moments import channel_moments
from bnguard.probes.hooks import Hooks, Note
from bnguard.probes.shapes import ShapeProbe, ShapeRecord

# Calls of a layer in one forward whose statistics are told apart; further ones share the last.
_MAX_STREAMS = 4


@dataclass
class _Average:
    """The average of batch statistics, mean and unbiased variance, shape ``(2, C)``."""

    batches: int = 0
    total: Tensor | None = None

    def add(self, statistics: Tensor) -> None:
        self.batches += 1
        self.total = statistics if self.total is None else self.total + statistics

    def value(self) -> Tensor | None:
        return None if self.total is None else self.total / self.batches


@dataclass
class _Record:
    pending: _Average = field(default_factory=_Average)
    streams: list[_Average] = field(default_factory=list)


class InputProbe:
    """Takes the statistics of each batch from the input of a layer: exact, and not free.

    Args:
        layers: The layers to read; only these pay for it.
        shapes: Tells the calls of a layer in one forward apart.
    """

    def __init__(self, layers: Iterable[BatchNormLayer], shapes: ShapeProbe) -> None:
        self.hooks = Hooks()
        self._records: dict[str, _Record] = {}
        for layer in layers:
            record = self._records[layer.name] = _Record()
            self.hooks.before(layer.module, _noted(layer, record, shapes.records[layer.name]))

    def take(self, layer: str) -> tuple[Tensor, int] | None:
        """Return the average of the batches since the last call, and their number."""
        record = self._records[layer]
        value, batches = record.pending.value(), record.pending.batches
        record.pending = _Average()
        return None if value is None else (value, batches)

    def streams(self, layer: str) -> list[Tensor]:
        """Return the average statistics of the first, second, … call in a forward, ``(2, C)``."""
        record = self._records.get(layer)
        averages = [] if record is None else [stream.value() for stream in record.streams]
        return [average for average in averages if average is not None]


def _noted(layer: BatchNormLayer, record: _Record, shapes: ShapeRecord) -> Note:
    @torch.no_grad()
    def note(args: tuple[object, ...]) -> None:
        if not (args and isinstance(args[0], Tensor) and layer.uses_batch_statistics):
            return
        moments = channel_moments(args[0])
        if moments.count < 2:
            return
        statistics = torch.stack([moments.mean, moments.var_unbiased])
        record.pending.add(statistics)
        # The shape probe's hook came first, and has counted this call.
        stream = min(max(shapes.calls_now, 1), _MAX_STREAMS) - 1
        while len(record.streams) <= stream:
            record.streams.append(_Average())
        record.streams[stream].add(statistics)

    return note
