"""Other statistics for the layers, computed from samples, and which layers need them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments
from bnguard.observe.history import RunningStatistics
from bnguard.recalibration.api import Method, calibrate, describe_calibration
from bnguard.recalibration.batches import Forward
from bnguard.recalibration.memory import keep_freed_memory
from bnguard.recalibration.result import LayerChange
from bnguard.recalibration.statistics import (
    copy_statistics,
    input_moments,
    read_inputs,
)
from bnguard.whatif.bench import Bench, Measured, Statistics
from bnguard.whatif.model_outputs import Outputs, collect_outputs
from bnguard.whatif.result import LayerShare
from bnguard.whatif.samples import Samples, copy_batch
from bnguard.whatif.table import CHANNEL_QUANTILE

# Samples that are enough to find the layers.
_SAMPLES = 256
# Groups of layers that do less of the harm than this are not split.
_NEGLIGIBLE_SHARE = 0.04
# At most this many times the splits that one bad layer takes, the worst group first.
_MOST_SPLITS = 3


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
    layers: tuple[BatchNormLayer, ...],
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
        with keep_freed_memory():
            found = calibrate(
                model,
                layers,
                map(copy_batch, samples.batches),
                method=method,
                samples=len(samples),
                forward=forward,
                progress=progress,
            )
        return Cure(
            changes={
                layer.name: LayerChange(
                    name=layer.name,
                    before=copy_statistics(layer),
                    after=_on_host(
                        found.estimates[layer.name].mean, found.estimates[layer.name].var
                    ),
                    eps=layer.eps,
                    values=found.estimates[layer.name].values,
                )
                for layer in layers
                if layer.name in found.estimates
            },
            left_out=found.left_out,
            notes=(*notes, *describe_calibration(found, method)),
        )

    try:
        return compute("exact")
    except CalibrationError as error:
        reason = str(error).partition(":")[0]
        return compute("precise", f"pooled over batches, because exact ones failed ({reason})")


def average_over_batches(bench: Bench, stored: Statistics) -> tuple[Cure, Outputs]:
    """Return the statistics that training on these batches would converge to, and the outputs.

    Each batch is normalised by its own statistics. A running average converges to the mean of the
    batch means, and of the unbiased batch variances.
    """
    parts: dict[str, list[Moments]] = {}

    def add(index: int, values: Tensor) -> None:
        moments = input_moments(values).on_host()
        if moments.count > 1 and moments.is_finite:
            parts.setdefault(bench.layers[index].name, []).append(moments)

    with bench.batch_statistics(None).in_use(), read_inputs(bench.layers, add):
        outputs = collect_outputs(bench.inner, bench.forward, bench.samples.batches)
    averaged = Cure(
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
    return averaged, outputs


def _mean(parts: Sequence[Moments]) -> RunningStatistics:
    return _on_host(
        torch.stack([part.mean for part in parts]).mean(0),
        torch.stack([part.var_unbiased for part in parts]).mean(0),
    )


def _on_host(mean: Tensor, var: Tensor) -> RunningStatistics:
    return RunningStatistics(mean=mean.numpy(), var=var.numpy(), updates=None)


def blame_layers(
    bench: Bench, cures: Mapping[str, Cure], name: str, measured: Mapping[str, Measured]
) -> tuple[LayerShare, ...]:
    """Return the layers that a cure changes with their shares of the harm, the worst first.

    The cure is swapped in for the first layers, and for the last ones. A layer's share is the mean
    over the two orders, because great harm saturates and hides other layers. Layers whose
    statistics are not finite are returned alone, and nothing is measured.

    ``name`` is the row of the cure to swap in; ``measured`` are the rows, whose outputs are known.
    """
    cure = cures[name]
    changes = [cure.changes[layer] for layer in bench.order_of_calls if layer in cure.changes]
    bad = [change for change in changes if change.max_shift_std is None]
    if bad:
        return tuple(LayerShare(change.name, None, None, None) for change in bad)
    batches = bench.samples.first(_SAMPLES)
    samples = sum(batch.size for batch in batches)

    def outputs_with(statistics: Statistics, row: str | None = None) -> Outputs:
        known = None if row is None else measured[row].outputs.first(samples)
        return bench.outputs_with(statistics, batches) if known is None else known

    expected = outputs_with(cure.statistics, name)

    def harm(cured: Sequence[LayerChange]) -> float:
        some = {change.name: change.after for change in cured}
        distance = outputs_with(some, None if some else "stored").change_from(expected)
        # Harm saturates: outputs that are far off are useless, however far.
        return 1.0 if math.isinf(distance) else distance / (1.0 + distance)

    # Layers that make up for others are not to blame.
    shares = [max(0.0, share) for share in _share(harm, changes)]
    whole = sum(shares) or 1.0
    layers = [
        LayerShare(
            name=change.name,
            share=share / whole,
            shift_std=change.max_shift_std,
            log_variance_ratio=change.extreme_log_variance_ratio,
        )
        for change, share in zip(changes, shares, strict=True)
    ]
    return tuple(sorted(layers, key=lambda layer: layer.share or 0.0, reverse=True))


def _share(
    harm: Callable[[Sequence[LayerChange]], float], changes: Sequence[LayerChange]
) -> list[float]:
    count, whole = len(changes), harm(())
    if whole <= 0.0:
        return [0.0] * count
    forwards = share_by_bisection(lambda cured: harm(changes[:cured]), count, whole)
    backwards = share_by_bisection(lambda cured: harm(changes[count - cured :]), count, whole)
    return [(one + other) / 2 for one, other in zip(forwards, reversed(backwards), strict=True)]


def share_by_bisection(harm: Callable[[int], float], count: int, whole: float) -> list[float]:
    """Return the share of each layer in the harm; they add up to 1.

    A layer's share is how far the harm falls when it is cured after all layers before it; negative
    if the harm rises. The layers of a group that was not split get equal shares. ``harm`` returns
    what is left when that many of the first layers are cured; ``whole``, above 0, when none is.

    Example:
        >>> asked = []
        >>> def harm(cured):
        ...     asked.append(cured)
        ...     return 1.0 if cured < 6 else 0.0
        >>> share_by_bisection(harm, 8, 1.0), asked
        ([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0], [4, 6, 5])
    """
    left = {0: whole, count: 0.0}

    def drop(group: tuple[int, int]) -> float:
        return left[group[0]] - left[group[1]]

    groups = [(0, count)]
    for _ in range(_MOST_SPLITS * math.ceil(math.log2(max(2, count)))):
        divisible = [group for group in groups if group[1] - group[0] > 1]
        worst = max(divisible, key=lambda group: abs(drop(group)), default=None)
        if worst is None or abs(drop(worst)) <= _NEGLIGIBLE_SHARE * whole:
            break
        start, stop = worst
        middle = (start + stop) // 2
        left[middle] = harm(middle)
        groups.remove(worst)
        groups += [(start, middle), (middle, stop)]
    return [
        drop(group) / (group[1] - group[0]) / whole
        for group in sorted(groups)
        for _ in range(*group)
    ]
