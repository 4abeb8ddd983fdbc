"""The numbers that causes are told from, and the other statistics that they come from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
from bnguard.whatif.result import Row
from bnguard.whatif.samples import BatchOrder, Samples
from bnguard.whatif.statistics import Statistics
from bnguard.whatif.table import CHANNEL_QUANTILE, Bench

# Between stored and recalibrated statistics, healthy networks change their outputs by up to 0.25 σ,
# 4 % of their predictions, and their score by up to 1.7 %. Less than all of these is no harm.
_MIN_CHANGE = 0.25
_MIN_FLIPPED_SHARE = 0.03
_MIN_SCORE_LOSS = 0.02
# Without a score the outputs alone have to tell.
_HARMFUL_CHANGE = 0.5
_HARMFUL_FLIPPED_SHARE = 0.08
# Beyond this the outputs are another network's, however far.
_UNRELATED = 1.0
# As BN303 has it.
MAX_INITIAL_WEIGHT = 0.05
# Of evaluation data from training data at the first BN layer; healthy ones stay below 0.1.
MAX_INPUT_DRIFT = 0.25
# The same of data from the stored statistics. A running average leaves up to 0.25 of it; other
# scales, offsets, channel orders and normalisations make 1.1 to 600.
MAX_STORED_DRIFT = 0.5
# The input is to blame where the first BN layer is so many times as far off as any later one, once
# those before have the right statistics. Other preprocessing reaches 1.7 to 30; averaged and pruned
# weights, which move every layer, at most 1.4.
_FIRST_ALONE = 1.5
# The stored variances are those of training batches where they are so much nearer to them.
_NEARER = 0.6
# Noise explains a distance up to so many times the expected one: small batches have heavy tails.
_MAX_NOISE = 4.0
_RUNNING = ("reference", "evaluation", "stored")
# The quantile of the absolute value of a normal variable that CHANNEL_QUANTILE is: 90 %.
_NORMAL_QUANTILE = 1.645


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the training data tell.

    Attributes:
        batch_size: Samples a batch.
        order: Whether the batches are sorted; None where that cannot be told.
        change: How far shuffling the batches changes the outputs where each is normalised by its
            own statistics, in standard deviations; None where it was not measured.
        flipped_share: Share of the predictions that it changes.
        from_data: How far the variances of the data are from the stored ones: the logarithm of
            their ratio, the mean over the layers.
        from_batches: The same of the mean variance of training batches; NaN where they have none.
        from_batches_by_noise: What the running average alone is expected to make of that.
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
        """Whether batches are sorted, and the network treats them otherwise than shuffled ones."""
        is_moved = is_harmful(self.change or 0.0, self.flipped_share or 0.0)
        return self.order is not None and self.order.is_sorted and is_moved

    @property
    def is_stored(self) -> bool:
        """Whether the stored statistics are those of training batches, and not of the data."""
        return self.from_batches <= _NEARER * self.from_data

    @property
    def is_noisy(self) -> bool:
        """Whether the noise of small batches explains how far the stored statistics are off."""
        return (
            self.from_batches_by_noise > 0.1
            and self.from_batches <= _MAX_NOISE * self.from_batches_by_noise
        )


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What the causes are told from.

    Attributes:
        rows: The rows of the table by name.
        samples: How many evaluation samples they were measured on.
        changed_share: Share of the predictions that differ from those with the statistics of the
            evaluation data, ties included, by the name of the row: what a score may gain by chance.
        training: What the training data tell; None without a reference.
        poisoned: Layers with NaN, Inf or a negative variance in their stored statistics.
        untouched: Layers that are reached, with the initial statistics (0, 1) to the last bit.
        initial_weight: The largest weight that the initial statistics still have.
        drifts: How far the data, of training where there are any, are from the stored statistics
            of each layer when those before it have the statistics of the data, in forward order.
        expected_score: What the user expects of the score; None where that was not said.
    """

    rows: Mapping[str, Row]
    samples: int
    changed_share: Mapping[str, float] = field(default_factory=dict)
    training: Training | None = None
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
        """Whether other running statistics would do better than the stored ones."""
        return self.loss("stored", self.best) > 0.0

    @property
    def is_cured_by_training(self) -> bool:
        """Whether most of the harm goes with statistics of the training data."""
        if self.training is None or not self.is_harmed:
            return False
        return self.gain("stored", "reference") >= self.gain("reference", self.best)

    @property
    def has_known_input(self) -> bool:
        """Whether the first BN layer gets from evaluation data what it gets from training data.

        Without training data its stored statistics stand in for them.
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
        """Whether the first BN layer is off, and those after it fit once that is set right."""
        if not self.drifts:
            return False
        first, *later = self.drifts
        return first > max(MAX_STORED_DRIFT, _FIRST_ALONE * max(later, default=0.0))

    def best_of(self, names: list[str]) -> str:
        """Return the name of the row that does best; without a score, of the evaluation data's."""
        scores = {name: self.rows[name].score for name in names}
        if any(score is None for score in scores.values()):
            return "evaluation"
        return max(names, key=lambda name: _number_or_lowest(scores[name]))

    def gain(self, name: str, than: str) -> float:
        """Return by how much another row does better than a row; may be negative.

        By the score where there is one, else by how much nearer the outputs are to those with
        the statistics of the evaluation data.
        """
        row, other = self.rows[name], self.rows[than]
        if row.score is None or other.score is None:
            return _distance(row) - _distance(other)
        if math.isnan(row.score) or math.isnan(other.score):
            return 0.0 if math.isnan(other.score) else math.inf
        return other.score - row.score

    def loss(self, name: str, than: str) -> float:
        """Return how much worse a row does than another; 0 where healthy networks do that too."""
        row, other, lost = self.rows[name], self.rows[than], self.gain(name, than)
        if row.score is None or other.score is None:
            flipped = (row.flipped_share or 0.0) - (other.flipped_share or 0.0)
            return lost if is_harmful(lost, flipped) else 0.0
        if math.isinf(lost):  # A score that is no number.
            return lost
        if not (_is_changed(row) or _is_changed(other)):
            return 0.0
        return lost if lost > self._healthy_loss(row.score, other.score) else 0.0

    def chance(self, name: str) -> float:
        """Return what a score that is a share may gain by chance, in a row that flips predictions.

        Three standard deviations of a sum of changes, each of which mends or breaks one prediction,
        also where two classes tie.
        """
        changed = self.changed_share.get(name, self.rows[name].flipped_share or 0.0)
        return 3.0 * math.sqrt(changed / max(self.samples, 1))

    @property
    def tolerance(self) -> float:
        """How much better the best row has to score than the stored statistics to count."""
        stored, best = self.rows["stored"].score, self.rows[self.best].score
        assert stored is not None
        assert best is not None
        healthy = self._healthy_loss(stored, best)
        return max(healthy, self.chance("stored")) if self._are_shares else healthy

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
        """Return how far apart two scores may be; those between 0 and 1 are shares of something."""
        return _MIN_SCORE_LOSS * max(abs(score), abs(other), 0.5 if self._are_shares else 0.0)

    @property
    def _are_shares(self) -> bool:
        scores = [row.score for row in self.rows.values() if row.score is not None]
        return all(0.0 <= each <= 1.0 for each in scores)


def is_harmful(change: float, flipped_share: float) -> bool:
    """Return whether outputs changed more than they do between healthy statistics.

    Args:
        change: In standard deviations.
        flipped_share: Share of the predictions that changed; 0 where there are none.
    """
    return change > _HARMFUL_CHANGE or (
        change > _MIN_CHANGE and flipped_share > _HARMFUL_FLIPPED_SHARE
    )


def _is_changed(row: Row) -> bool:
    return row.change > _MIN_CHANGE or (row.flipped_share or 0.0) > _MIN_FLIPPED_SHARE


def _distance(row: Row) -> float:
    return min(row.change, _UNRELATED)


def _number_or_lowest(score: float | None) -> float:
    return -math.inf if score is None or math.isnan(score) else score


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


def compute_cure(
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

    def computed(method: Method, *notes: str) -> Cure:
        with preserve_statistics(layers), warnings.catch_warnings():
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


def average_over_batches(bench: Bench, stored: Statistics) -> Cure:
    """Return where training on these batches would bring the statistics: the mean of theirs.

    Each batch is normalised by its own statistics; a running average that has converged is the
    mean of the batch means, and of the unbiased batch variances.
    """
    parts: dict[str, list[Moments]] = {}

    def arrive(index: int, values: Tensor) -> None:
        moments = on_host(input_moments(values))
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


def read_training(bench: Bench, from_data: Cure, from_batches: Cure) -> Training:
    """Return what the training data tell.

    Args:
        bench: The model on the training data.
        from_data: Statistics of all of them.
        from_batches: What training on their batches would store.
    """
    samples = bench.samples
    order, change, flipped_share = samples.order, None, None
    if order is not None and order.is_sorted:
        shuffled = bench.outputs_in_shuffled_batches()
        if shuffled is not None:
            as_they_come = bench.outputs_in_batches(samples.batches)
            change = as_they_come.change_from(shuffled)
            flipped_share = as_they_come.flipped_share(shuffled)
    return Training(
        batch_size=samples.batch_size,
        order=order,
        change=change,
        flipped_share=flipped_share,
        from_data=_mean_log_variance_ratio(from_data),
        from_batches=_mean_log_variance_ratio(from_batches),
        from_batches_by_noise=_noise(bench),
    )


def _mean_log_variance_ratio(cure: Cure) -> float:
    """Return the mean distance over the layers; means are left out, as batch order moves them.

    NaN where no layer has statistics, as of batches of one value per channel.
    """
    distances = [_log_variance_ratio(change) for change in cure.changes.values()]
    return float(np.mean(distances)) if distances else math.nan


def _log_variance_ratio(change: LayerChange) -> float:
    return float(np.quantile(np.abs(change.log_variance_ratio), CHANNEL_QUANTILE))


def _noise(bench: Bench) -> float:
    """Return the log-variance ratio that a running average over so small batches has by chance.

    The variance of n normal values has a relative variance of 2 / (n - 1), of which an average
    with momentum m keeps m / (2 - m).
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
    # A cumulative average of a hundred batches; more leave no noise to speak of.
    kept = 0.01 if momentum is None else momentum / max(2.0 - momentum, 1.0)
    return _NORMAL_QUANTILE * math.sqrt(2.0 / max(values - 1, 1) * kept)
