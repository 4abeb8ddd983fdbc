"""Statistics to try in place of the stored ones, computed from data."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments
from bnguard.observe.history import RunningStatistics
from bnguard.recalibration.api import recalibrate
from bnguard.recalibration.batches import Forward
from bnguard.recalibration.layer_inputs import arrived_moments, is_finite, on_host
from bnguard.recalibration.result import LayerChange
from bnguard.whatif.bench import Bench
from bnguard.whatif.samples import Samples
from bnguard.whatif.statistics import Statistics, lent_statistics


@dataclass(frozen=True, eq=False)
class Cure:
    """Statistics that were computed from samples.

    Attributes:
        changes: How far each layer's are from the stored ones, by the layer's name.
        left_out: Batches that were left out, for they bring NaN or Inf to a layer.
        notes: What a reader should know of how they were computed.
    """

    changes: Mapping[str, LayerChange]
    left_out: int = 0
    notes: tuple[str, ...] = ()

    @property
    def statistics(self) -> Statistics:
        """The statistics, by the layer's name."""
        return {name: change.after for name, change in self.changes.items()}


def recalibrated(
    model: nn.Module,
    layers: Sequence[BatchNormLayer],
    samples: Samples,
    *,
    forward: Forward | None,
    progress: bool,
) -> Cure:
    """Return what a recalibration on these samples would store; the model keeps what it has.

    Where a layer has no exact statistics, for it is called on what its own output led to, those
    of batches are pooled in their place.

    Raises:
        CalibrationError: The statistics cannot be computed.
    """

    def computed(method: str, *notes: str) -> Cure:
        with lent_statistics(layers), warnings.catch_warnings():
            # It stands among the notes.
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
        return computed("exact")
    except CalibrationError as error:
        reason = str(error).partition(":")[0]
        return computed("precise", f"pooled over batches, for there is nothing exact ({reason})")


def averaged_over_batches(bench: Bench, stored: Statistics) -> Cure:
    """Return where training on these batches would bring the statistics: the mean of theirs.

    Each batch is normalised by its own statistics; a running average that has converged is the
    mean of the batch means, and of the unbiased batch variances.
    """
    parts: dict[str, list[Moments]] = {}

    def arrive(index: int, values: Tensor) -> None:
        moments = on_host(arrived_moments(values))
        if moments.count > 1 and is_finite(moments):
            parts.setdefault(bench.layers[index].name, []).append(moments)

    bench.arrive_in_batches(arrive)
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
