"""The mode gap before and after a recalibration, on samples from all over the calibration set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.observe.history import ModeGap, RunningStatistics
from bnguard.observe.mode_gap import GapProbe
from bnguard.recalibration.batches import Batch, Forward, call, can_be_joined, joined
from bnguard.recalibration.statistics import borrowed, write_statistics

_MOST_SAMPLES = 64


class GapSamples:
    """Between 32 and 64 samples from all over a stream of batches; all where there are fewer."""

    def __init__(self) -> None:
        self._rows: list[Batch] = []
        self._seen, self._every = 0, 1
        self._uncut: Batch | None = None

    def kept(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Keep samples of batches on their way."""
        for batch in batches:
            if batch.can_be_cut:
                self._keep_rows(batch)
            elif self._uncut is None:
                self._uncut = batch.copied()
            yield batch

    @property
    def batch(self) -> Batch | None:
        """The samples, as far as they can be joined to the first; None where nothing passed."""
        if not self._rows:
            return self._uncut
        return joined([row for row in self._rows if can_be_joined(self._rows[0], row)])

    def _keep_rows(self, batch: Batch) -> None:
        for row in range(batch.size):
            if self._seen % self._every == 0:
                self._rows.append(batch.rows(row, row + 1).copied())
            self._seen += 1
            if len(self._rows) == _MOST_SAMPLES:
                self._rows = self._rows[::2]
                self._every *= 2


class GapMeter:
    """Measures the mode gap of a model with statistics of any time, and leaves it as it is.

    Args:
        model: The model.
        layers: Its layers that have batch statistics in the one mode; all others stay in eval mode.
        forward: How the model is called; None for the way that most loaders mean.
        batch: The samples; None where there are none.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[BatchNormLayer],
        forward: Forward | None,
        batch: Batch | None,
    ) -> None:
        self._model, self._layers, self._forward, self._batch = model, layers, forward, batch

    def measured_with(self, statistics: Mapping[str, RunningStatistics]) -> ModeGap | str:
        """Return the mode gap with these running statistics, or why it cannot be measured."""
        if self._batch is None:
            return "there is no sample to measure it on"
        with borrowed(self._model, self._layers):
            for layer in self._layers:
                mean, var = statistics[layer.name].mean, statistics[layer.name].var
                if not (np.isfinite(mean).all() and np.isfinite(var).all()):
                    return f"the statistics of {layer.name} were not finite"
                write_statistics(layer, torch.from_numpy(mean), torch.from_numpy(var))
            probe = GapProbe(self._model, self._layers)
            try:
                call(self._model, self._forward, self._batch.copied())
                return probe.measure()
            except CalibrationError as error:
                return str(error)
            finally:
                probe.close()
