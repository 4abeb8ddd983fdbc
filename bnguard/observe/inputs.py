"""Batch statistics of single calls, for the few layers whose buffers do not tell them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import channel_moments, values_per_channel, wide
from bnguard.observe.autograd import saved_statistics, saves_statistics
from bnguard.observe.hooks import Hooks, Note


@dataclass
class Average:
    """The average of batch statistics, mean and unbiased variance, shape ``(2, C)``."""

    batches: int = 0
    total: Tensor | None = None

    def add(self, statistics: Tensor) -> None:
        """Add those of one batch."""
        self.batches += 1
        self.total = statistics if self.total is None else self.total + statistics

    def value(self) -> Tensor | None:
        """Return the average; None of nothing."""
        return None if self.total is None else self.total / self.batches


@dataclass
class _Record:
    pending: Average
    is_saved_by_autograd: bool = False


class InputProbe:
    """Takes the statistics of each batch from the call of a layer, and not from its buffers.

    What autograd saved costs next to nothing; a look at the input where it saved nothing does.

    Args:
        layers: The layers to read; only these pay for it.
    """

    def __init__(self, layers: Iterable[BatchNormLayer]) -> None:
        self.hooks = Hooks()
        self._records: dict[str, _Record] = {}
        for layer in layers:
            record = self._records[layer.name] = _Record(Average())
            self.hooks.after(layer.module, _noted(layer, record))

    def take(self, layer: str) -> tuple[Tensor, int] | None:
        """Return the average of the batches since the last call, and their number."""
        record = self._records[layer]
        value, batches = record.pending.value(), record.pending.batches
        record.pending = Average()
        return None if value is None else (value, batches)

    def place(self, layer: str) -> str:
        """Return where the statistics of a layer are read: ``"autograd"`` or ``"inputs"``."""
        record = self._records.get(layer)
        return "autograd" if record is not None and record.is_saved_by_autograd else "inputs"


def batch_statistics(layer: BatchNormLayer, value: object, output: object) -> Tensor | None:
    """Return mean and unbiased variance of a batch, ``(2, C)``; None for no batch."""
    if not (isinstance(value, Tensor) and layer.normalises(value)):
        return None
    n = values_per_channel(value.shape)
    if n < 2:
        return None
    saved = saved_statistics(output, layer.eps)
    if saved is None:
        moments = channel_moments(value)
        return torch.stack([moments.mean, moments.var_unbiased])
    mean, var = saved
    return torch.stack([wide(mean), var * (n / (n - 1))])


def _noted(layer: BatchNormLayer, record: _Record) -> Note:
    @torch.no_grad()
    def note(args: tuple[object, ...], output: object) -> None:
        if not (args and layer.uses_batch_statistics):
            return
        statistics = batch_statistics(layer, args[0], output)
        if statistics is not None:
            record.is_saved_by_autograd = saves_statistics(output)
            record.pending.add(statistics)

    return note
