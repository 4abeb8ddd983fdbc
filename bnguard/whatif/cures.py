"""Other statistics for the layers, computed from samples: exact, or averaged over batches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments
from bnguard.layers.preserve import preserve_statistics
from bnguard.observe.history import RunningStatistics
from bnguard.recalibration.api import Method, recalibrate
from bnguard.recalibration.batches import Forward
from bnguard.recalibration.layer_inputs import input_moments, is_finite, on_host
from bnguard.recalibration.result import LayerChange
from bnguard.whatif.samples import Samples
from bnguard.whatif.statistics import Statistics
from bnguard.whatif.table import CHANNEL_QUANTILE, Bench


@dataclass(frozen=True, eq=False)
class Cure:
    """Statistics that were computed from samples.

    Attributes:
        changes: How far each layer's are from the stored ones, by the layer's name.
        left_out: Batches that were left out because they put NaN or Inf into a layer.
        notes: What a reader should know about how they were computed.
    """

    changes: Mapping[str, LayerChange]
    left_out: int = 0
    notes: tuple[str, ...] = ()

    @property
    def statistics(self) -> Statistics:
        """The statistics, by the layer's name."""
        return {name: change.after for name, change in self.changes.items()}

    @property
    def log_variance_ratio(self) -> float:
        """Distance of the variances from the stored ones: the mean over the layers.

        NaN without layers. Means are left out, because the order of batches moves them.
        """
        distances = [
            np.quantile(np.abs(change.log_variance_ratio), CHANNEL_QUANTILE)
            for change in self.changes.values()
        ]
        return float(np.mean(distances)) if distances else math.nan


def compute_cure(
    model: nn.Module,
    layers: Sequence[BatchNormLayer],
    samples: Samples,
    *,
    forward: Forward | None,
    progress: bool,
) -> Cure:
    """Return what a recalibration on these samples would store, without storing it.

    Statistics of batches are pooled if exact ones do not exist, because a layer's input depends on
    its own output.

    Raises:
        CalibrationError: The statistics cannot be computed.
    """

    def compute(method: Method, *notes: str) -> Cure:
        with preserve_statistics(layers), warnings.catch_warnings():
            # The notes say it.
            warnings.filterwarnings("ignore", "bnguard: .* left out")
            result = recalibrate(
                model,
                samples.fresh_payloads(),
                method=method,
                samples=len(samples),
                forward=forward,
                progress=progress,
            )
        return Cure(
            changes={change.name: change for change in result.layers},
            left_out=result.left_out,
            notes=(*notes, *result.notes),
        )

    try:
        return compute("exact")
    except CalibrationError as error:
        reason = str(error).partition(":")[0]
        return compute("precise", f"pooled over batches, because exact ones failed ({reason})")


def average_over_batches(bench: Bench, stored: Statistics) -> Cure:
    """Return the statistics that training on these batches would converge to.

    Each batch is normalised by its own statistics. A running average converges to the mean of the
    batch means, and of the unbiased batch variances.
    """
    parts: dict[str, list[Moments]] = {}

    def add(index: int, values: Tensor) -> None:
        moments = on_host(input_moments(values))
        if moments.count > 1 and is_finite(moments):
            parts.setdefault(bench.layers[index].name, []).append(moments)

    bench.read_inputs_in_batches(add)
    return Cure(
        {
            layer.name: LayerChange(
                name=layer.name,
                before=stored[layer.name],
                after=_mean(parts[layer.name]),
                eps=layer.eps,
                values=sum(part.count for part in parts[layer.name]),
            )
            for layer in bench.layers
            if layer.name in parts
        }
    )


def _mean(parts: Sequence[Moments]) -> RunningStatistics:
    mean = torch.stack([part.mean for part in parts]).mean(0)
    var = torch.stack([part.var_unbiased for part in parts]).mean(0)
    return RunningStatistics(mean=mean.numpy(), var=var.numpy(), updates=None)
