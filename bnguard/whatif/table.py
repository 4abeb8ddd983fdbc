"""The rows of the table: each way to normalise, measured on the same samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.observe.history import RunningStatistics
from bnguard.recalibration.result import LayerChange
from bnguard.whatif.bench import Bench, Measured, Statistics
from bnguard.whatif.model_outputs import LayerInput, Outputs
from bnguard.whatif.result import Row
from bnguard.whatif.samples import MIN_BATCHES, BatchOrder, Samples

# Share of a layer's channels that must be within a limit, as for BN301.
CHANNEL_QUANTILE = 0.9


@dataclass(frozen=True)
class LayerDrift:
    """How far the inputs of a layer are from its statistics.

    Attributes:
        layer: Dotted name of the layer.
        shift_std: Absolute shift of the mean that 90 % of the channels stay below, in standard
            deviations of the statistics.
        log_variance_ratio: The same of the logarithm of the variance ratio.
    """

    layer: str
    shift_std: float
    log_variance_ratio: float

    @property
    def largest(self) -> float:
        """The larger of the two; NaN if one is not a number."""
        return float(np.maximum(self.shift_std, self.log_variance_ratio))


def measure_drifts(
    layers: Iterable[BatchNormLayer], inputs: Mapping[str, LayerInput], statistics: Statistics
) -> list[LayerDrift]:
    """Return how far each layer's inputs are from its statistics, in forward order."""
    eps = {layer.name: layer.eps for layer in layers}
    return [
        measure_drift(
            LayerChange(
                name=name,
                before=statistics[name],
                after=RunningStatistics(
                    mean=seen.moments.mean.numpy(),
                    var=seen.moments.var_unbiased.numpy(),
                    updates=None,
                ),
                eps=eps[name],
                values=seen.moments.count,
            )
        )
        for name, seen in inputs.items()
        if name in statistics and seen.moments is not None
    ]


def measure_drift(change: LayerChange) -> LayerDrift:
    """Return how far statistics are from those before."""
    with np.errstate(all="ignore"):
        shift, ratio = (
            float(np.quantile(np.abs(values), CHANNEL_QUANTILE))
            for values in (change.shift_std, change.log_variance_ratio)
        )
    return LayerDrift(change.name, shift, ratio)


_LABELS = {
    "stored": "as they are",
    "reference": "recalibrated on training data",
    "averaged": "averaged over training batches",
    "evaluation": "recalibrated on evaluation data",
}


@dataclass(frozen=True, eq=False)
class Table:
    """The rows, and what they were computed from.

    Attributes:
        rows: The rows by name, the stored statistics first.
        measured: The outputs of each row except that of shuffled batches.
        changed_share: Share of the predictions that differ from those with the statistics of the
            evaluation data, ties included, by the name of the row.
        orders: Whether the batches of a row are sorted, by the name of the row.
        notes: Why rows are missing.
    """

    rows: Mapping[str, Row]
    measured: Mapping[str, Measured]
    changed_share: Mapping[str, float]
    orders: Mapping[str, BatchOrder]
    notes: tuple[str, ...]


def measure_table(
    bench: Bench, stored: Statistics, cures: Mapping[str, Statistics], batch_sizes: Iterable[int]
) -> Table:
    """Measure the model with its own statistics, with others, and with those of batches.

    ``cures`` are others by the name of their row, ``"evaluation"`` among them.

    Raises:
        CalibrationError: The model fails, or its outputs cannot be compared.
    """
    measured = {"stored": bench.with_statistics({})}
    measured |= {name: bench.with_statistics(statistics) for name, statistics in cures.items()}
    labels = {name: _LABELS[name] for name in measured}
    own, notes = bench.samples.batch_size, []
    orders: dict[str, BatchOrder | None] = {}
    for size in (own, *sorted(set(batch_sizes) - {own})):
        reason = bench.why_not_in_batches(size)
        if reason is not None:
            notes.append(f"no row for batches of {size}: {reason}")
        elif size == own:
            measured["batches"] = bench.with_batches(None)
            orders["batches"] = bench.samples.order() or bench.samples.order(_part(bench.samples))
            labels["batches"] = f"of each batch, as they come ({own})"
        else:
            measured[f"batches of {size}"] = bench.with_batches(size)
            orders[f"batches of {size}"] = bench.samples.order(size)
            labels[f"batches of {size}"] = f"of each batch of {size}"
    outputs = {name: each.outputs for name, each in measured.items()}
    if "batches" in measured and (shuffled := bench.outputs_in_shuffled_batches()) is not None:
        outputs["shuffled batches"] = shuffled
        labels["shuffled batches"] = f"of each batch of {own}, shuffled"
    drifting = {
        name: measure_drifts(bench.layers, measured[name].inputs, statistics)
        for name, statistics in {"stored": stored, **cures}.items()
    }
    rows = {
        name: _row(
            name,
            labels[name],
            each,
            outputs,
            score=measured[name].score if name in measured else None,
            drifting=drifting.get(name, ()),
        )
        for name, each in outputs.items()
    }
    expected = outputs["evaluation"]
    changed = {name: each.changed_share(expected) for name, each in outputs.items()}
    known = {name: order for name, order in orders.items() if order is not None}
    return Table(rows, measured, changed, known, tuple(notes))


def _part(samples: Samples) -> int:
    """Return the size of parts of batches that are enough to be compared."""
    return max(2, samples.batch_size * len(samples.batches) // (2 * MIN_BATCHES))


def _row(
    name: str,
    label: str,
    outputs: Outputs,
    others: Mapping[str, Outputs],
    *,
    score: float | None,
    drifting: Sequence[LayerDrift],
) -> Row:
    expected, batches = others["evaluation"], others.get("batches")
    drift = max(drifting, key=_largest_or_bad, default=None)
    return Row(
        name=name,
        label=label,
        score=score,
        change=outputs.change_from(expected),
        flipped_share=outputs.flipped_share(expected),
        gap=None if batches is None else outputs.change_from(batches),
        drift_std=None if drift is None else drift.shift_std,
        drift_log_variance=None if drift is None else drift.log_variance_ratio,
        drift_layer=None if drift is None else drift.layer,
        input_drift=drifting[0].largest if drifting else None,
    )


def _largest_or_bad(drift: LayerDrift) -> float:
    return math.inf if math.isnan(drift.largest) else drift.largest
