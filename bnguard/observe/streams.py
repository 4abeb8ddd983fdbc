"""Several calls of a layer in one step, told apart by their batch statistics."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.observe.autograd import is_recomputing
from bnguard.observe.history import Stream
from bnguard.observe.hooks import Hooks, Note
from bnguard.observe.inputs import Average, batch_statistics
from bnguard.observe.layer_calls import ShapeProbe, ShapeRecord

# Calls of a layer in one step that are told apart; further ones share the last.
_MAX_STREAMS = 4
# Calls of a stream that are read; what comes later costs nothing.
_MAX_CALLS = 16


class StreamProbe:
    """Averages the batch statistics of the first, second, … call of a layer in a step.

    Args:
        shapes: Counts the calls of a step.
    """

    def __init__(self, shapes: ShapeProbe) -> None:
        self.hooks = Hooks()
        self._shapes = shapes
        self._averages: dict[str, list[Average]] = {}

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Read these layers as well, until enough was seen of each."""
        for layer in layers:
            if layer.name not in self._averages:
                averages = self._averages[layer.name] = []
                record = self._shapes.records[layer.name]
                self.hooks.after(layer.module, _noted(layer, record, averages))

    def streams(self, layer: str) -> tuple[Stream, ...]:
        """Return the average statistics of the first, second, … call of a layer in a step."""
        averages = self._averages.get(layer, [])
        return tuple(
            Stream(mean=mean, var_unbiased=var, batches=average.batches)
            for average in averages
            if (value := average.value()) is not None
            for mean, var in [value.cpu().numpy()]
        )


def _noted(layer: BatchNormLayer, record: ShapeRecord, averages: list[Average]) -> Note:
    usual_momentum = layer.momentum

    @torch.no_grad()
    def note(args: tuple[object, ...], output: object) -> None:
        if not (args and layer.uses_batch_statistics) or is_recomputing():
            return
        # Those who estimate the statistics anew set another momentum for it.
        if layer.momentum != usual_momentum:
            return
        # The hook of the shape probe came before the call, and has counted it.
        stream = min(max(record.calls_now, 1), _MAX_STREAMS) - 1
        while len(averages) <= stream:
            averages.append(Average())
        if averages[stream].batches >= _MAX_CALLS:
            return
        statistics = batch_statistics(layer, args[0], output)
        if statistics is not None:
            averages[stream].add(statistics)

    return note
