"""The numbers that a verdict is reached from, and when they count as harm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.overrides import TorchFunctionMode

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.preserve import preserve_modes
from bnguard.observe.eval_statistics import drops_values
from bnguard.rules.measurements import HARMFUL_CHANGE, HARMFUL_FLIPPED_SHARE
from bnguard.whatif.bench import Bench, Statistics
from bnguard.whatif.cures import Cure, average_over_batches
from bnguard.whatif.model_outputs import Outputs
from bnguard.whatif.result import Row
from bnguard.whatif.samples import BatchOrder

# Between stored and recalibrated statistics, healthy networks change their outputs by up to 0.25 σ,
# 4 % of their predictions, and their score by up to 1.7 %. Less than all of these is no harm.
_MIN_CHANGE = 0.25
_MIN_FLIPPED_SHARE = 0.03
_MIN_SCORE_LOSS = 0.02
# Outputs that are further off than this are another network's; how far does not matter.
_UNRELATED = 1.0
# As in BN303.
MAX_INITIAL_WEIGHT = 0.05
# Of evaluation data from training data at the first BN layer; healthy networks stay below 0.1.
MAX_INPUT_DRIFT = 0.25
# The same of data from the stored statistics. A running average leaves up to 0.25; other scales,
# offsets, channel orders and normalisations make 1.1 to 600.
MAX_STORED_DRIFT = 0.5
# The input is the cause if the first BN layer is this many times as far off as any later one, once
# the layers before have the right statistics. Other preprocessing reaches 1.7 to 30; averaged and
# pruned weights, which move every layer, at most 1.4.
_FIRST_ALONE = 1.5
# The stored variances are those of other data if they are nearer to them by this factor.
_NEARER = 0.6
# Noise explains up to this many times the expected distance: small batches have heavy tails.
_MAX_NOISE = 4.0
_RUNNING = ("reference", "evaluation", "stored")
# The 90 % quantile, as CHANNEL_QUANTILE, of the absolute value of a normal variable.
_NORMAL_QUANTILE = 1.645


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the training data show.

    Attributes:
        batch_size: Samples per batch.
        order: Whether the batches are sorted; None if unknown.
        change: How far shuffling the batches changes the outputs if each batch is normalised by
            its own statistics, in standard deviations; None if not measured.
        flipped_share: Share of the predictions that shuffling changes.
        from_data: Distance of the variances of the data from the stored ones, as
            :attr:`Cure.log_variance_ratio`.
        from_batches: The same of the mean variance of training batches.
        from_batches_by_noise: The part of it that the noise of a running average explains.
    """

    batch_size: int
    order: BatchOrder | None
    change: float | None
    flipped_share: float | None
    from_data: float
    from_batches: float
    from_batches_by_noise: float

    @property
    def is_sorted(self) -> bool:
        """Whether batches are sorted, and shuffling them changes the outputs."""
        is_moved = exceeds_healthy_change(self.change or 0.0, self.flipped_share or 0.0)
        return self.order is not None and self.order.is_sorted and is_moved

    @property
    def is_stored(self) -> bool:
        """Whether the stored statistics are those of training batches, and not of the data."""
        return self.from_batches <= _NEARER * self.from_data

    @property
    def is_noisy(self) -> bool:
        """Whether the noise of small batches explains how far the stored statistics are off."""
        expected = self.from_batches_by_noise
        return expected > 0.1 and self.from_batches <= _MAX_NOISE * expected


@dataclass(frozen=True)
class Dropout:
    """How far the variances of data are from the stored ones, with dropout and without.

    Attributes:
        kind: Class or function of the dropout.
        active: Log-variance ratio with dropout active.
        inactive: The same without dropout.
    """

    kind: str
    active: float
    inactive: float

    @property
    def is_stored(self) -> bool:
        """Whether the stored statistics are those that the data have with dropout active."""
        return self.active <= _NEARER * self.inactive


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a verdict is reached from.

    Attributes:
        rows: The rows of the table by name.
        samples: How many evaluation samples they were measured on.
        batch_size: Samples of an evaluation batch; None if unknown.
        changed_share: Share of the predictions that differ from those with the statistics of the
            evaluation data, ties included, by the name of the row: what a score may gain by chance.
        orders: Whether evaluation batches are sorted, by the name of the row that uses them.
        training: What the training data show; None without a reference.
        dropout: What dropout explains; None without active dropout.
        poisoned: Layers with NaN, Inf or a negative variance in their stored statistics.
        untouched: Layers that are reached, with exactly the initial statistics (0, 1).
        initial_weight: The largest weight that the initial statistics still have.
        drifts: How far the data (training data if given) are from the stored statistics of each
            layer if those before it have the statistics of the data, in forward order.
        expected_score: The score that the user expects, if any.
    """

    rows: Mapping[str, Row]
    samples: int
    batch_size: int | None = None
    changed_share: Mapping[str, float] = field(default_factory=dict)
    orders: Mapping[str, BatchOrder] = field(default_factory=dict)
    training: Training | None = None
    dropout: Dropout | None = None
    poisoned: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()
    initial_weight: float = 0.0
    drifts: Sequence[float] = ()
    expected_score: float | None = None

    @property
    def best(self) -> str:
        """Name of the row of running statistics that does best."""
        return self.best_of([name for name in _RUNNING if name in self.rows])

    @property
    def fresh(self) -> str:
        """Name of the row with statistics of training data, or of evaluation data without any."""
        return "evaluation" if self.training is None else "reference"

    @property
    def is_harmed(self) -> bool:
        """Whether other running statistics do better than the stored ones."""
        return self.loss("stored", self.best) > 0.0

    @property
    def is_cured_by_training(self) -> bool:
        """Whether statistics of the training data remove most of the harm."""
        if self.training is None or not self.is_harmed:
            return False
        return self.gain("stored", "reference") >= self.gain("reference", self.best)

    @property
    def is_cured(self) -> bool:
        """Whether fresh statistics remove most of the harm."""
        return self.is_harmed and (self.training is None or self.is_cured_by_training)

    @property
    def is_unconverged(self) -> bool:
        """Whether too much of the initial statistics is left."""
        return self.initial_weight > MAX_INITIAL_WEIGHT

    @property
    def has_dropout_stored(self) -> bool:
        """Whether the stored statistics are those of the data with dropout active."""
        return self.dropout is not None and self.dropout.is_stored

    @property
    def has_known_input(self) -> bool:
        """Whether evaluation data match training data at the first BN layer.

        Without training data its stored statistics are used in their place.
        """
        drift = self.rows["stored" if self.training is None else "reference"].input_drift
        return drift is not None and drift <= MAX_INPUT_DRIFT

    @property
    def is_off_training(self) -> bool:
        """Whether evaluation data differ from training data at the first BN layer."""
        row = self.rows.get("reference")
        return row is not None and (row.input_drift or 0.0) > MAX_INPUT_DRIFT

    @property
    def is_off_stored(self) -> bool:
        """Whether evaluation data differ from the stored statistics of the first BN layer."""
        return (self.rows["stored"].input_drift or 0.0) > MAX_STORED_DRIFT

    @property
    def is_off_at_input_alone(self) -> bool:
        """Whether the first BN layer is off, and later ones fit once that is corrected."""
        if not self.drifts:
            return False
        first, *later = self.drifts
        return first > max(MAX_STORED_DRIFT, _FIRST_ALONE * max(later, default=0.0))

    def best_of(self, names: Sequence[str]) -> str:
        """Return the name of the row that does best; without a score, of the evaluation data's."""
        scores = {name: self.rows[name].score for name in names}
        if any(score is None for score in scores.values()):
            return "evaluation"
        return max(names, key=lambda name: _number_or_lowest(scores[name]))

    def gain(self, name: str, than: str) -> float:
        """Return by how much another row does better than a row; may be negative.

        Measured by the score, or without one by how much nearer the outputs are to those with the
        statistics of the evaluation data.
        """
        row, other = self.rows[name], self.rows[than]
        if row.score is None or other.score is None:
            return _distance(row) - _distance(other)
        if math.isnan(row.score) or math.isnan(other.score):
            return 0.0 if math.isnan(other.score) else math.inf
        return other.score - row.score

    def loss(self, name: str, than: str) -> float:
        """Return how much worse a row does than another; 0 if healthy networks do that too."""
        row, other, lost = self.rows[name], self.rows[than], self.gain(name, than)
        if row.score is None or other.score is None:
            flipped = (row.flipped_share or 0.0) - (other.flipped_share or 0.0)
            return lost if exceeds_healthy_change(lost, flipped) else 0.0
        if math.isinf(lost):  # A score of NaN.
            return lost
        if not (_is_changed(row) or _is_changed(other)):
            return 0.0
        return lost if lost > self._healthy_loss(row.score, other.score) else 0.0

    def chance(self, name: str) -> float:
        """Return what a score that is a share may gain by chance, in a row that flips predictions.

        Three standard deviations of a sum of changes, each correcting or breaking one prediction,
        also if two classes tie.
        """
        changed = self.changed_share.get(name, self.rows[name].flipped_share or 0.0)
        return 3.0 * math.sqrt(changed / max(self.samples, 1))

    def tolerance(self, name: str) -> float:
        """Return how much better than the stored statistics a row has to score to count."""
        stored, other = self.rows["stored"].score, self.rows[name].score
        assert stored is not None
        assert other is not None
        healthy = self._healthy_loss(stored, other)
        chance = max(self.chance("stored"), self.chance(name))
        return max(healthy, chance) if self._are_shares else healthy

    def compared(self, *names: str) -> str:
        """Return the measure that decides, for some rows, in words."""
        rows = [self.rows[name] for name in dict.fromkeys(names)]
        if all(row.score is not None for row in rows):
            return "score " + ", ".join(f"{row.score:.4g} {row.label}" for row in rows)
        if all(row.flipped_share is not None for row in rows):
            shares = ", ".join(f"{row.flipped_share:.1%} {row.label}" for row in rows)
            return f"predictions flipped: {shares}"
        return "outputs changed: " + ", ".join(f"{row.change:.3g} σ {row.label}" for row in rows)

    def _healthy_loss(self, score: float, other: float) -> float:
        """Return how far apart two scores of healthy networks may be."""
        return _MIN_SCORE_LOSS * max(abs(score), abs(other), 0.5 if self._are_shares else 0.0)

    @property
    def _are_shares(self) -> bool:
        scores = [row.score for row in self.rows.values() if row.score is not None]
        return all(0.0 <= each <= 1.0 for each in scores)


def exceeds_healthy_change(change: float, flipped_share: float) -> bool:
    """Return whether outputs changed more than they do between healthy statistics.

    Args:
        change: In standard deviations.
        flipped_share: Share of the predictions that changed; 0 without predictions.
    """
    return change > HARMFUL_CHANGE or (
        change > _MIN_CHANGE and flipped_share > HARMFUL_FLIPPED_SHARE
    )


def read_training(bench: Bench, from_data: Cure, from_batches: Cure, outputs: Outputs) -> Training:
    """Return what the training data show, on whose samples the bench is.

    ``from_data`` are statistics of all of them, ``from_batches`` and ``outputs`` what
    :func:`average_over_batches` gives.
    """
    samples = bench.samples
    order, change, flipped_share = samples.order(), None, None
    if order is not None and order.is_sorted:
        shuffled = bench.outputs_in_shuffled_batches()
        if shuffled is not None:
            change = outputs.change_from(shuffled)
            flipped_share = outputs.flipped_share(shuffled)
    return Training(
        batch_size=samples.batch_size,
        order=order,
        change=change,
        flipped_share=flipped_share,
        from_data=from_data.log_variance_ratio,
        from_batches=from_batches.log_variance_ratio,
        from_batches_by_noise=_noise(bench),
    )


def read_dropout(bench: Bench, stored: Statistics, averaged: Cure | None) -> Dropout | None:
    """Return what dropout explains of the stored variances; None without active dropout.

    ``averaged`` is what :func:`average_over_batches` gives, if that is known already.
    """
    dropouts = [module for module in bench.inner.modules() if drops_values(module)]
    kind = type(dropouts[0]).__name__ if dropouts else ""
    if not dropouts:
        layers = {layer.module for layer in (*bench.layers, *bench.untracked)}
        dropouts = [module for module in bench.inner.modules() if module not in layers]
        kind = _functional_dropout(bench, dropouts)
    if not kind:
        return None
    if averaged is None:
        averaged, _ = average_over_batches(bench, stored)
    with preserve_modes(bench.inner):
        for dropout in dropouts:
            dropout.training = True
        active, _ = average_over_batches(bench, stored)
    return Dropout(kind, active.log_variance_ratio, averaged.log_variance_ratio)


def _functional_dropout(bench: Bench, modules: Sequence[nn.Module]) -> str:
    """Return the dropout function that forwards call if these modules are in train mode, if any."""
    calls = _DropoutCalls()
    with preserve_modes(bench.inner), calls:
        for module in modules:
            module.training = True
        try:
            bench.outputs_in_batches(bench.samples.batches[:1])
        except Exception:  # such as a loss in train mode, for which targets are missing
            return ""
    return calls.name


class _DropoutCalls(TorchFunctionMode):
    """Notes the name of a function that drops values, such as ``F.dropout(x, self.training)``."""

    name = ""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if "dropout" in func.__name__:
            self.name = func.__name__
        return func(*args, **(kwargs or {}))


def _noise(bench: Bench) -> float:
    """Return the log-variance ratio that a running average over batches has by chance.

    The variance of n normal values has a relative variance of 2 / (n - 1); an average with
    momentum m keeps m / (2 - m) of it.
    """
    size = bench.samples.batch_size
    per_layer = [
        _layer_noise(layer, size * bench.values_per_sample[layer.name])
        for layer in bench.layers
        if layer.name in bench.values_per_sample
    ]
    return float(np.mean(per_layer))


def _layer_noise(layer: BatchNormLayer, values: int) -> float:
    momentum = layer.momentum
    # A cumulative average of a hundred batches; more leave almost no noise.
    kept = 0.01 if momentum is None else momentum / max(2.0 - momentum, 1.0)
    return _NORMAL_QUANTILE * math.sqrt(2.0 / max(values - 1, 1) * kept)


def _is_changed(row: Row) -> bool:
    return row.change > _MIN_CHANGE or (row.flipped_share or 0.0) > _MIN_FLIPPED_SHARE


def _distance(row: Row) -> float:
    return min(row.change, _UNRELATED)


def _number_or_lowest(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else score
