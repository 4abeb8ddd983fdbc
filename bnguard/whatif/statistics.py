"""Normalise with other statistics for a while: given ones, or those of each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import values_per_channel
from bnguard.layers.preserve import preserve_statistics
from bnguard.observe.history import RunningStatistics
from bnguard.recalibration.statistics import write_statistics

Statistics = Mapping[str, RunningStatistics]


@contextmanager
def use_statistics(layers: Sequence[BatchNormLayer], statistics: Statistics) -> Iterator[None]:
    """Let layers normalise with these statistics; layers not among them keep theirs."""
    with preserve_statistics(layers):
        for layer in layers:
            if layer.name in statistics:
                given = statistics[layer.name]
                write_statistics(layer, torch.from_numpy(given.mean), torch.from_numpy(given.var))
        yield


@dataclass(eq=False)
class BatchStatistics:
    """Lets layers normalise a fixed number of samples at a time by their own statistics.

    A larger batch is normalised in parts, so that a score can be measured at any batch size up to
    that of its own batches. Each layer counts samples by the rows that one sample has there.

    Attributes:
        layers: The layers, in eval mode.
        rows: Rows per sample in a layer's input, by the layer's name.
        size: Samples per part; None for batches as they come.
        largest_part: Samples in the largest part so far.
    """

    layers: Sequence[BatchNormLayer]
    rows: Mapping[str, int]
    size: int | None
    largest_part: int = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Normalise this way for a while."""
        with preserve_statistics(self.layers), ExitStack() as replaced:
            for layer in self.layers:
                replaced.enter_context(self._replaced_forward(layer))
            yield

    @contextmanager
    def _replaced_forward(self, layer: BatchNormLayer) -> Iterator[None]:
        attributes = vars(layer.module)
        own = attributes.get("forward")
        attributes["forward"] = self._in_parts(layer, layer.module.forward)
        try:
            yield
        finally:
            if own is None:
                del attributes["forward"]
            else:
                attributes["forward"] = own

    def _in_parts(
        self, layer: BatchNormLayer, forward: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        rows = self.rows.get(layer.name, 1)

        def normalise(values: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
            self.largest_part = max(self.largest_part, len(values) // rows)
            # A single value has no variance to divide by: the last batch may be one sample.
            with _training(layer, values_per_channel(values.shape) > 1):
                return call(values)

        def in_parts(*args: Any, **kwargs: Any) -> Tensor:
            if args:
                values, call = args[0], lambda part: forward(part, *args[1:], **kwargs)
            else:
                key, values = next(iter(kwargs.items()))
                call = lambda part: forward(**{**kwargs, key: part})  # noqa: E731
            if self.size is None or len(values) <= self.size * rows:
                return normalise(values, call)
            sizes = [self.size * rows] * (len(values) // (self.size * rows))
            sizes[-1] += len(values) - sum(sizes)
            return torch.cat([normalise(part, call) for part in values.split(sizes)])

        return in_parts


@contextmanager
def _training(layer: BatchNormLayer, wanted: bool) -> Iterator[None]:
    before = layer.module.training
    layer.module.training = wanted
    try:
        yield
    finally:
        layer.module.training = before
