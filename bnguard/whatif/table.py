"""The rows of the table: each way to normalise, measured on the same samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch import nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.distances import FloatArray, log_variance_ratio, shift_std
from bnguard.layers.preserve import preserve_modes, preserve_random_states, preserve_statistics
from bnguard.observe.history import RunningStatistics
from bnguard.recalibration.batches import Batch, Forward
from bnguard.recalibration.layer_inputs import OnInput, read_inputs
from bnguard.recalibration.options import Score, as_number
from bnguard.whatif.model_outputs import LayerInput, Outputs, collect_inputs, collect_outputs
from bnguard.whatif.result import Row
from bnguard.whatif.samples import MIN_BATCHES, BatchOrder, Samples
from bnguard.whatif.statistics import BatchStatistics, Statistics, use_statistics

# Share of a layer's channels that must be within a limit, as for BN301.
CHANNEL_QUANTILE = 0.9


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The model with one way to normalise.

    Attributes:
        outputs: Outputs of the model.
        score: Result of the score; None without one, or if its batches are too small.
        inputs: Inputs of each layer that was reached, in the order of first calls; empty if
            batches have statistics of their own.
    """

    outputs: Outputs
    score: float | None
    inputs: Mapping[str, LayerInput]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A model on some samples.

    Attributes:
        model: The user's model, which is scored.
        inner: The same without wrappers, in eval mode.
        layers: The layers whose statistics change.
        untracked: Layers that always use the statistics of each batch.
        forward: Calls the model.
        score: Returns how good the model is, the higher the better.
        samples: The samples.
    """

    model: nn.Module
    inner: nn.Module
    layers: Sequence[BatchNormLayer]
    untracked: Sequence[BatchNormLayer]
    forward: Forward | None
    score: Score | None
    samples: Samples

    def with_statistics(self, statistics: Statistics) -> Measured:
        """Measure the model with given statistics."""
        with use_statistics(self.layers, statistics):
            inputs, outputs = collect_inputs(
                self.layers, self.inner, self.forward, self.samples.batches
            )
            return Measured(outputs=outputs, score=self._scored(), inputs=inputs)

    def with_batches(self, size: int | None) -> Measured:
        """Measure the model with each ``size`` samples normalised by their own statistics.

        Batches are used as they come if it is None.
        """
        batches = self.samples.batches if size is None else self.samples.of_size(size)
        outputs = self.outputs_in_batches(batches, size)
        parts = self._batch_statistics(size)
        with parts.in_use():
            score = self._scored()
        is_full = size is None or parts.largest_part >= size
        return Measured(outputs=outputs, score=score if is_full else None, inputs={})

    def outputs_with(self, statistics: Statistics, batches: Iterable[Batch]) -> Outputs:
        """Return the outputs for some batches with given statistics."""
        with use_statistics(self.layers, statistics):
            return collect_outputs(self.inner, self.forward, batches)

    def outputs_in_batches(self, batches: Iterable[Batch], size: int | None = None) -> Outputs:
        """Return the outputs with each ``size`` samples normalised by their own statistics."""
        with self._batch_statistics(size).in_use():
            return collect_outputs(self.inner, self.forward, batches)

    def read_inputs_in_batches(self, on_input: OnInput) -> None:
        """Call ``on_input`` with each layer's inputs while batches have their own statistics.

        Args:
            on_input: Takes the index of the layer, and the inputs.
        """
        # Counting the rows of a sample takes a forward, which must not reach the hooks.
        parts = self._batch_statistics(None)
        with parts.in_use(), read_inputs(self.layers, on_input):
            collect_outputs(self.inner, self.forward, self.samples.batches)

    def outputs_in_shuffled_batches(self) -> Outputs | None:
        """Return the same with other neighbours in each batch; None if that is impossible."""
        shuffled = self.samples.shuffled()
        if shuffled is None:
            return None
        order, batches = shuffled
        return self.outputs_in_batches(batches).in_order(order)

    def why_not_in_batches(self, size: int) -> str | None:
        """Return why batches cannot have this size; None if they can."""
        if size > len(self.samples):
            number = len(self.samples)
            return "there is 1 sample" if number == 1 else f"there are {number} samples"
        if self.samples.must_be_joined(size):
            # The one batch would take the remainder, and be of another size.
            if size != len(self.samples) < 2 * size:
                return f"{len(self.samples)} samples make only one"
            if self.samples.whole is None:
                return "the samples do not fit together, so that batches cannot be joined"
            if self._one_batch[1].samples is None:
                return "the outputs have no row a sample, so that batches cannot be joined"
        for name, values in self.values_per_sample.items():
            if size * values < 2:
                return f"{name or 'the model'} has one value per channel"
        return None

    @property
    def values_per_sample(self) -> Mapping[str, int]:
        """Values per channel and sample at each layer that is reached."""
        return {name: seen.values_per_sample for name, seen in self._layer_inputs.items()}

    @property
    def order_of_calls(self) -> Sequence[str]:
        """Names of the layers that are reached, in the order of their first calls."""
        return list(self._layer_inputs)

    def without_nonfinite_batches(self, statistics: Statistics) -> Bench:
        """Return the same without the samples whose outputs are NaN or Inf with these statistics.

        Raises:
            CalibrationError: That leaves none.
        """
        batches = tuple(
            batch
            for batch in self.samples.batches
            if self.outputs_with(statistics, [batch]).are_finite
        )
        if not batches:
            raise CalibrationError(
                "the outputs are NaN or Inf for every batch, with any statistics"
            )
        return replace(self, samples=Samples(batches, self.samples.payloads))

    @property
    def _layer_inputs(self) -> Mapping[str, LayerInput]:
        return self._one_batch[0]

    @cached_property
    def _one_batch(self) -> tuple[Mapping[str, LayerInput], Outputs]:
        """Inputs of the layers and outputs for one batch, which show the rows per sample."""
        layers = (*self.layers, *self.untracked)
        return collect_inputs(layers, self.inner, self.forward, self.samples.batches[:1])

    def _batch_statistics(self, size: int | None) -> BatchStatistics:
        layers = [layer for layer in (*self.layers, *self.untracked) if layer.has_modes]
        rows = {name: seen.rows for name, seen in self._layer_inputs.items()}
        return BatchStatistics(layers, rows, size)

    def _scored(self) -> float | None:
        if self.score is None:
            return None
        with (
            preserve_modes(self.model),
            preserve_random_states(self.model),
            preserve_statistics((*self.layers, *self.untracked)),
        ):
            return as_number(self.score(self.model))


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
            name, seen.moments.mean.numpy(), seen.moments.var_unbiased.numpy(), given, eps[name]
        )
        for name, seen in inputs.items()
        if (given := statistics.get(name)) is not None and seen.moments is not None
    ]


def measure_drift(
    name: str, mean: FloatArray, var: FloatArray, given: RunningStatistics, eps: float
) -> LayerDrift:
    """Return how far a mean and a variance are from the statistics given."""
    with np.errstate(all="ignore"):
        shift = shift_std(mean, given.mean, given.var, eps)
        ratio = log_variance_ratio(var, given.var, eps)
        return LayerDrift(
            layer=name,
            shift_std=float(np.quantile(np.abs(shift), CHANNEL_QUANTILE)),
            log_variance_ratio=float(np.quantile(np.abs(ratio), CHANNEL_QUANTILE)),
        )


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

    Args:
        bench: The model on its samples.
        stored: The statistics that it has.
        cures: Others by the name of their row, ``"evaluation"`` among them.
        batch_sizes: Sizes at which batches are normalised by their own statistics.

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
