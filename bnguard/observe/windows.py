"""What was read of a layer or a model in one stretch of training or evaluation: plain numbers.

Arrays are float64 of shape ``(C,)``, a value per channel. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from bnguard.layers.distances import FloatArray


@dataclass(kw_only=True, slots=True)
class Calls:
    """Counts of the calls of a layer; up to ``between_steps``, of those with batch statistics.

    Attributes:
        in_training: Calls in training, recomputed activations included.
        without_grad: Those under ``torch.no_grad``.
        steps_without_grad: Steps with such a call.
        outside: Those outside a forward of the model, as by a part of it or in the backward.
        has_other_weights: Whether some ran with gamma and beta that are not the layer's own, as in
            the inner loop of a meta-learner through ``torch.func.functional_call``.
        recomputed: Those inside a backward, which computes activations again.
        between_steps: Those under ``torch.no_grad`` between two steps without a call in eval mode:
            an evaluation without eval().
        steps_with_some_between: Steps that such calls preceded.
        since_training: Those under ``torch.no_grad`` since the newest training call.
        estimating: Calls that estimate the statistics again, as ``update_bn`` does; counted only
            here.
        in_evaluation: Calls inside an evaluation; counted only here.
        is_in_eval_mode: Whether it was ever called in eval mode.
        in_eval_mode_with_grad: Calls in eval mode with gradients, outside evaluations.
        frozen: Those while the model was in train mode.
        frozen_after: Those after ``unfrozen_step``.
        unfrozen_step: Step of the first call with batch statistics after a frozen one.
        left_out: Forwards of evaluation, in eval mode, of the module that holds the layer, without
            a call of it or of another layer inside that module.
        change_left_out: How far that module's outputs were from those with the layer called, in
            their standard deviations; None if unknown.
        most_per_forward: Most calls in one forward of the model, or in a step of its parts alone.
        most_per_step: Most calls in one step.
    """

    in_training: int = 0
    without_grad: int = 0
    steps_without_grad: int = 0
    outside: int = 0
    has_other_weights: bool = False
    recomputed: int = 0
    between_steps: int = 0
    steps_with_some_between: int = 0
    since_training: int = 0
    estimating: int = 0
    in_evaluation: int = 0
    is_in_eval_mode: bool = False
    in_eval_mode_with_grad: int = 0
    frozen: int = 0
    frozen_after: int = 0
    unfrozen_step: int | None = None
    left_out: int = 0
    change_left_out: float | None = None
    most_per_forward: int = 0
    most_per_step: int = 0

    @property
    def are_without_grad(self) -> bool:
        """Whether training called the layer only under ``torch.no_grad``, like a teacher."""
        return 0 < self.in_training == self.without_grad

    @property
    def are_of_meta_learner(self) -> bool:
        """Whether weights were adapted and never used in eval mode: the batch is to normalise."""
        return self.has_other_weights and not self.is_in_eval_mode

    @property
    def may_be_of_several_sources(self) -> bool:
        """Whether different callers may give the layer different data.

        Activations that the backward computes again ran under ``torch.no_grad`` before.
        """
        return self.most_per_step > 1 or bool(self.without_grad and not self.recomputed)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunningStatistics:
    """The running statistics of a layer, used in eval mode.

    Attributes:
        mean: Running mean.
        var: Running variance, the unbiased estimate.
        updates: ``num_batches_tracked``; None if the layer has no counter.
    """

    mean: FloatArray
    var: FloatArray
    updates: int | None

    @property
    def is_initial(self) -> bool:
        """Whether mean and variance are exactly 0 and 1."""
        return bool(np.all(self.mean == 0.0) and np.all(self.var == 1.0))

    @property
    def bad_channels(self) -> tuple[int, ...]:
        """Channels whose mean or variance is NaN or infinite."""
        finite = np.isfinite(self.mean) & np.isfinite(self.var)
        return tuple(int(channel) for channel in np.flatnonzero(~finite))


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchWindow:
    """Batch statistics of a layer over the newest window of training steps.

    Attributes:
        batches: Batches with finite statistics, per channel.
        mean: Mean of the batch means.
        var_unbiased: Mean of the within-batch variances, the unbiased estimate.
        var_of_means: Variance of the batch means, the unbiased estimate, drift included.
        var_of_means_successive: The same without slow drift: half the mean square of successive
            differences (von Neumann et al., "The mean square successive difference", 1941).
        var_max: Largest within-batch variance.
    """

    batches: FloatArray
    mean: FloatArray
    var_unbiased: FloatArray
    var_of_means: FloatArray
    var_of_means_successive: FloatArray
    var_max: FloatArray

    @property
    def noise_std(self) -> FloatArray:
        """Spread of the batch means without drift, in standard deviations of the values."""
        total = self.var_unbiased + self.var_of_means_successive
        with np.errstate(all="ignore"):
            return np.sqrt(self.var_of_means_successive / np.where(total > 0.0, total, np.nan))

    @property
    def trend(self) -> float:
        """Spread of the batch means over the window, in units of that between neighbours.

        1 for independent batches, more if weights move; the median over channels, NaN if unknown.
        The root of 2 over von Neumann's ratio ("Distribution of the ratio of the mean square
        successive difference to the variance", 1941).
        """
        with np.errstate(all="ignore"):
            ratio = np.sqrt(self.var_of_means / self.var_of_means_successive)
        known = ratio[np.isfinite(ratio)]
        return float(np.median(known)) if known.size else math.nan


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalWindow:
    """The inputs of a layer in the newest evaluation, and the running statistics at that time.

    Attributes:
        count: Values per channel in all calls that were read.
        batches: Calls that were read.
        nonfinite_batches: Calls with NaN or Inf, which the moments leave out.
        mean: Mean of the values.
        var_unbiased: Variance of the values, the unbiased estimate.
        running: The running statistics.
        step: Training step after which the evaluation ran.
        largest_normalised_std: Largest distance of a value from the running mean, in running
            standard deviations; NaN if no value was finite.
        padding_share: Share of trailing constant padding among the positions of a sample, mean.
        padding_spread: Standard deviation of that share over the samples.
        dtype: Element type of the values, as in ``"float16"`` under autocast.
        var_between: Variance of the batch means beyond that of independent samples; None for one
            batch.
        between_share: Share of the variance between samples that lies between batches, the median
            over channels (intraclass correlation): 0 for independent samples, large for sorted
            ones.
        is_between_shown: Whether independent samples would seldom give as large a share.
        dropout_before: Class of the dropout between the previous BN layer and this one, if any.
        is_held: Whether training called the layer in eval mode only, so that it did not learn with
            batch statistics.
    """

    count: int
    batches: int
    mean: FloatArray
    var_unbiased: FloatArray
    running: RunningStatistics
    step: int
    nonfinite_batches: int = 0
    largest_normalised_std: float = 0.0
    padding_share: float = 0.0
    padding_spread: float = 0.0
    dtype: str = "float32"
    var_between: FloatArray | None = None
    between_share: float = 0.0
    is_between_shown: bool = True
    dropout_before: str = ""
    is_held: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Batch statistics of the first, second, … call of a layer in a step, averaged over steps.

    Attributes:
        mean: Average of the batch means.
        var_unbiased: Average of the within-batch variances, the unbiased estimate.
        batches: Batches in the average.
        mean_error: Standard error of the mean, from the differences of batches; 0 if unknown.
        var_error: Standard error of the variance, likewise.
    """

    mean: FloatArray
    var_unbiased: FloatArray
    batches: int
    mean_error: FloatArray | float = 0.0
    var_error: FloatArray | float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class InputWindow:
    """How much the training batches differ, over the newest window.

    Attributes:
        batches: Batches compared: one more than the degrees of freedom.
        variance_ratio: Variance of the batch means times the batch size, over the variance within
            a batch, for each of some numbers of a sample that vary; 1 for independent samples.
        windows: Windows compared.
        between_windows: Variance between neighbouring windows beyond that of their batches, as a
            share of that between samples, for each number; empty if there are too few windows.
        neighbour_change: Half the mean squared change from a batch to the next over the variance of
            the batch means (von Neumann's ratio), of the first batches of the run: 1 in random
            order, less where neighbours are alike, 2 where two kinds take turns.
        neighbour_excess_std: Its distance from 1, in standard deviations of a random order.
    """

    batches: int
    variance_ratio: FloatArray
    windows: int = 1
    between_windows: FloatArray = field(default_factory=lambda: np.empty(0))
    neighbour_change: float = 1.0
    neighbour_excess_std: float = 0.0


@dataclass(frozen=True)
class UnknownLayer:
    """A module that normalises over the batch in training and is not known as a BN layer.

    Attributes:
        module: Dotted name of the module, ``""`` for the model itself.
        kind: Name of its class.
        place: File and line of its forward, or of the call.
        advice: How to make it known, such as the call of ``register_layer``.
    """

    module: str
    kind: str
    place: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class BadValueOrigin:
    """The module in which NaN or Inf first appeared, in the next bad forward after one was noticed.

    Attributes:
        module: Its dotted name, ``""`` for the model itself.
        kind: Name of its class.
        channels: Channels of its output that were not finite; empty if it has none.
        is_input_bad: Whether its input was not finite already.
        bad_parameters: Names of its own parameters and buffers that are not finite.
        samples: Indices in the batch of the samples whose output was not finite.
        step: Training step of that forward.
        largest_input: Largest absolute value of its input; None without numbers.
        largest_parameter: Largest absolute value of its own parameters.
    """

    module: str
    kind: str
    channels: tuple[int, ...]
    is_input_bad: bool
    bad_parameters: tuple[str, ...]
    samples: tuple[int, ...] = ()
    step: int | None = None
    largest_input: float | None = None
    largest_parameter: float | None = None


@dataclass(frozen=True, kw_only=True)
class ModeGap:
    """Difference of the outputs for one batch between the two modes, all else in eval mode.

    Attributes:
        samples: Samples in the batch; 0 if the rows of the inputs are not independent samples, as
            the nodes of a graph.
        relative_change: Root mean square difference between the outputs under running and under
            batch statistics, in standard deviations of the latter; infinite if not finite.
        sampling_change: The same between half the batch and the whole, both with their own
            statistics, which is what sampling explains; None if unknown.
        flipped_share: Share of samples whose predicted class changes, ties within 0.05 of
            probability left out; None if the outputs do not look like class scores.
    """

    samples: int
    relative_change: float
    sampling_change: float | None
    flipped_share: float | None


@dataclass(frozen=True, kw_only=True)
class LayerView:
    """What a layer does to training, on one batch.

    Attributes:
        step: Training step whose update was measured.
        saturated_share: Share of the layer's outputs beyond ±2, where sigmoid and tanh are flat.
        saturated_share_without: The same of its inputs, which the activation would get without BN.
        dead_share: Share of the channels without a positive output, which ReLU sets to 0.
        dead_share_without: The same of its inputs.
        noise_std: Spread of a sample's normalised value over random batches of this size, in σ;
            None for fewer than 16 samples.
        gradient_cosine: Cosine of the gradients of the parameters between the BN layer before and
            this one (included), before and after the update of the parameters before them; None
            for the first layer.
        gradient_change: Distance of the two gradients, relative to the first.
    """

    step: int = 0
    saturated_share: float
    saturated_share_without: float
    dead_share: float
    dead_share_without: float
    noise_std: float | None
    gradient_cosine: float | None = None
    gradient_change: float | None = None
