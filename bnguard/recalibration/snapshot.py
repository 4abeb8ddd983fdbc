"""The running statistics of some layers as they were, and the way back to them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.observe.history import RunningStatistics
from bnguard.recalibration.statistics import current_statistics


class Snapshot:
    """Running statistics and counters of layers, as they are when this is made."""

    def __init__(self, layers: Sequence[BatchNormLayer]) -> None:
        self.statistics = {layer.name: running_statistics(layer) for layer in layers}
        self._buffers = [
            (holder[key], holder[key].detach().clone())
            for layer in layers
            for holder, key in layer.statistics()
        ]

    def restore(self) -> None:
        """Put the values back into the tensors that they were taken from."""
        with torch.no_grad():
            for buffer, values in self._buffers:
                buffer.copy_(values)


def running_statistics(layer: BatchNormLayer) -> RunningStatistics:
    """Return the statistics that a layer has now, on the host in float64."""
    mean, var = current_statistics(layer)
    return RunningStatistics(
        mean=mean.cpu().double().numpy().copy(),
        var=var.cpu().double().numpy().copy(),
        updates=None if layer.counter is None else int(layer.counter),
    )
