"""What was read of a layer or a model in one stretch of training or evaluation: plain numbers.

Arrays have shape ``(C,)``, a value per channel, in float64. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Sized
from dataclasses import dataclass, field

import numpy as np

from bnguard.layers.distances import FloatArray


@dataclass(kw_only=True, slots=True)
class Calls:
    """How often, and how, a layer was called.

    The counts from ``in_training`` to ``between_steps`` are of calls that normalised with the
    statistics of the batch.

    Attributes:
        in_training: In training, activations that are computed again included.
        without_grad: How many of them ran under ``torch.no_grad``.
        steps_without_grad: In how many steps there was one.
        outside: How many ran outside a forward of the model: an activation that is recomputed in
            the backward, or a part of the model that is called by itself.
        recomputed: How many ran inside a backward: activations that are computed again.
        between_steps: How many ran under ``torch.no_grad`` between two steps, where none in eval
            mode did: an evaluation without eval().
        steps_with_some_between: Steps before which there were some.
        estimating: Those that estimated the statistics anew, as ``update_bn`` does; they count
            nowhere else.
        in_evaluation: Those inside an evaluation; they count nowhere else.
        is_in_eval_mode: Whether it was ever called in eval mode.
        in_eval_mode_with_grad: With running statistics and gradients, in no evaluation.
        frozen: How many of them came while the model was in train mode.
        frozen_after: How many of these came after ``unfrozen_step``.
        unfrozen_step: Step of the first call with batch statistics that followed a frozen one.
        most_per_forward: The most calls in one forward of the model; a step in which only parts of
            it are called is a forward, too.
        most_per_step: The most calls in one step.
    """

    in_training: int = 0
    without_grad: int = 0
    steps_without_grad: int = 0
    outside: int = 0
    recomputed: int = 0
    between_steps: int = 0
    steps_with_some_between: int = 0
    estimating: int = 0
    in_evaluation: int = 0
    is_in_eval_mode: bool = False
    in_eval_mode_with_grad: int = 0
    frozen: int = 0
    frozen_after: int = 0
    unfrozen_step: int | None = None
    most_per_forward: int = 0
    most_per_step: int = 0

    @property
    def are_without_grad(self) -> bool:
        """Whether training called the layer only under ``torch.no_grad``, like a teacher."""
        return 0 < self.in_training == self.without_grad

    @property
    def may_be_of_several_sources(self) -> bool:
        """Whether batches may be unlike each other by what calls the layer.

        What is computed again in the backward ran under ``torch.no_grad`` before.
        """
        return self.most_per_step > 1 or bool(self.without_grad and not self.recomputed)


@dataclass(frozen=True, kw_only=True, eq=False)
class RunningStatistics:
    """The ``running_mean`` and ``running_var`` buffers of a layer, used in eval mode.

    Attributes:
        mean: Running mean.
        var: Running variance, the unbiased estimate.
        updates: ``num_batches_tracked``; None where the layer has no counter.
    """

    mean: FloatArray
    var: FloatArray
    updates: int | None

    @property
    def is_initial(self) -> bool:
        """Whether mean and variance are still exactly 0 and 1."""
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
        batches: Batches observed, a count per channel (a batch whose statistics were not finite
            in a channel does not count there).
        mean: Mean of the batch means.
        var_unbiased: Mean of the within-batch variances, the unbiased estimate.
        var_of_means: Variance of the batch means over the window, the unbiased estimate; slow
            drift of the weights is part of it.
        var_of_means_successive: The same from successive differences, which slow drift does not
            enter: half their mean square (von Neumann et al., "The mean square successive
            difference", 1941).
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
        """Spread of the batch means, drift left out, in standard deviations of the values."""
        total = self.var_unbiased + self.var_of_means_successive
        with np.errstate(all="ignore"):
            return np.sqrt(self.var_of_means_successive / np.where(total > 0.0, total, np.nan))

    @property
    def trend(self) -> float:
        """How much wider the batch means spread over the window than between neighbours.

        1 for independent batches, more where weights move; the median over channels, NaN where not
        known. It is the root of 2 over von Neumann's ratio ("Distribution of the ratio of
        the mean square successive difference to the variance", 1941).
        """
        with np.errstate(all="ignore"):
            ratio = np.sqrt(self.var_of_means / self.var_of_means_successive)
        known = ratio[np.isfinite(ratio)]
        return float(np.median(known)) if known.size else math.nan


@dataclass(frozen=True, kw_only=True, eq=False)
class EvalWindow:
    """What arrived at a layer in the newest evaluation, and the statistics it was held against.

    Attributes:
        count: Values per channel, over all batches observed.
        batches: Forward calls observed.
        nonfinite_batches: Calls that held NaN or Inf, which do not enter the moments.
        mean: Mean of the values.
        var_unbiased: Variance of the values, the unbiased estimate.
        largest_normalised_std: Largest distance of a value from the running mean, in running
            standard deviations; NaN where no value was finite.
        padding_share: Share of trailing constant padding among the positions of a sample, the
            mean over samples.
        padding_spread: Standard deviation of that share over the samples.
        dtype: Element type of the values, as in ``"float16"`` under autocast.
        var_between: Variance of the batch means beyond what batches of independent samples have;
            None where it cannot be told, as of one batch.
        between_share: Share of the variance between samples that lies between batches, the median
            over channels (the intraclass correlation); 0 for independent samples, large where an
            evaluation is sorted, so that its first batches do not stand for the rest.
        is_between_shown: Whether independent samples would seldom give as large a share: pairs,
            unless they are many, cannot show it.
        dropout_before: Class of the dropout that acts between the BN layer before and this one, in
            training alone; empty where none was called.
        running: The running statistics at that time.
        step: Training step after which the evaluation ran.
        is_held: Whether training called the layer in eval mode as well in its newest step: the
            statistics of batches are no part of what it has learnt with.
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
    """Batch statistics of one of several calls of a layer in a step, averaged over steps.

    Attributes:
        mean: Average of the batch means.
        var_unbiased: Average of the within-batch variances, the unbiased estimate.
        batches: Batches in the average.
        mean_error: Standard error of the mean, from how the batches differ; 0 where not known.
        var_error: The same of the variance.
    """

    mean: FloatArray
    var_unbiased: FloatArray
    batches: int
    mean_error: FloatArray | float = 0.0
    var_error: FloatArray | float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class InputWindow:
    """How much the batches that the model was given differ, over the newest window of training.

    Attributes:
        batches: Batches that were compared: one more than the degrees of freedom.
        variance_ratio: Variance of the batch means times the samples of a batch, over the variance
            of the samples of a batch, a value for each of some numbers of a sample; those that
            never vary are left out. Samples that are drawn independently give 1.
        windows: Windows of training that were compared, this one and those before.
        between_windows: Variance between neighbouring windows beyond what their batches explain,
            as a share of that between samples, a value for each of the numbers; 0 for independent
            samples, and nearly so where data change slowly. Empty where there are too few windows.
    """

    batches: int
    variance_ratio: FloatArray
    windows: int = 1
    between_windows: FloatArray = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True)
class UnknownLayer:
    """What normalises over the batch in training, and is not a BN layer that is known.

    Attributes:
        module: Dotted name of the module, ``""`` for the model itself.
        kind: Name of its class.
        place: File and line of its forward, or of the call.
        advice: What makes it known, as the call of ``register_layer``.
    """

    module: str
    kind: str
    place: str
    advice: str


@dataclass(frozen=True, kw_only=True)
class BadValueOrigin:
    """The module in which a NaN or Inf first appeared in a forward.

    Poisoned buffers say that a batch was bad; hooks, put on then, find the place in the next bad
    one: that is the forward told of here.

    Attributes:
        module: Its dotted name, ``""`` for the model itself.
        kind: Name of its class.
        channels: Channels of its output that were not finite; empty where it has none.
        is_input_bad: Whether its input was not finite already: the batch, or what came before.
        bad_parameters: Names of its own parameters and buffers that are not finite.
        samples: Places in the batch of the samples whose output was not finite.
        step: Training step of that forward.
        largest_input: The largest absolute value of its input; None where there is no number.
        largest_parameter: The same of its own parameters.
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
    """How far the outputs for one batch differ between the two modes, all else in eval mode.

    Attributes:
        samples: Samples in the batch; 0 where its inputs do not share a first dimension.
        relative_change: Root mean square difference between the outputs under running and under
            batch statistics, in standard deviations of the latter; infinite where not finite.
        sampling_change: The same between statistics of half the batch and of the whole: what
            sampling alone explains; None for fewer than 4 samples.
        flipped_share: Share of samples whose largest class score is another, by more than 0.05 of
            probability in one of the modes; None where the outputs do not look like class scores.
    """

    samples: int
    relative_change: float
    sampling_change: float | None
    flipped_share: float | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What loader, trainer and launcher say of a training before its first batch.

    Attributes:
        batch_size: Samples a batch on this rank; None where not known.
        samples: Samples an epoch on this rank; None where not known.
        drops_last: Whether the last, smaller batch of an epoch is left out.
        ranks: How many processes train together.
        accumulated_batches: Batches whose gradients are added before a step of the optimizer.
        label_run: Samples of one label that follow each other, on average, where samples are drawn
            in the order of the dataset; None where they are not, or labels are not known.
        shuffled_label_run: The same if they were shuffled.
    """

    batch_size: int | None = None
    samples: int | None = None
    drops_last: bool = False
    ranks: int = 1
    accumulated_batches: int = 1
    label_run: float | None = None
    shuffled_label_run: float | None = None

    @property
    def last_batch_size(self) -> int | None:
        """Samples in the last batch of an epoch; None where not known.

        >>> Plan(batch_size=32, samples=65).last_batch_size
        1
        >>> Plan(batch_size=32, samples=65, drops_last=True).last_batch_size
        32
        """
        if not self.batch_size or self.samples is None:
            return None
        if self.drops_last:
            return self.batch_size
        return self.samples % self.batch_size or min(self.batch_size, self.samples)

    @property
    def smallest_batch_size(self) -> int | None:
        """Samples in the smallest batch of an epoch; None where not known."""
        return self.batch_size if self.last_batch_size is None else self.last_batch_size


def plan_training(
    loader: object | None = None, *, ranks: int = 1, accumulated_batches: int = 1
) -> Plan:
    """Return what a loader says about its batches, without drawing one.

    The sampler knows the share of a rank; a batch sampler of the user's own knows its own sizes,
    and nothing is assumed of it.

    Args:
        loader: A ``DataLoader``, or anything with its attributes; others say nothing.
        ranks: How many processes train together.
        accumulated_batches: Batches whose gradients are added before a step of the optimizer.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> plan_training(DataLoader(range(65), batch_size=32)).last_batch_size
        1
    """
    batches = getattr(loader, "batch_sampler", None)
    batch_size = getattr(batches, "batch_size", None)
    if type(batches).__name__ != "BatchSampler" or not isinstance(batch_size, int):
        return Plan(ranks=ranks, accumulated_batches=accumulated_batches)
    sampler = getattr(batches, "sampler", None)
    is_in_order = type(sampler).__name__ == "SequentialSampler"
    runs = _label_runs(getattr(sampler, "data_source", None)) if is_in_order else None
    return Plan(
        label_run=None if runs is None else runs[0],
        shuffled_label_run=None if runs is None else runs[1],
        batch_size=batch_size,
        samples=_length(sampler),
        drops_last=bool(getattr(batches, "drop_last", False)),
        ranks=ranks,
        accumulated_batches=accumulated_batches,
    )


def _length(sampler: object) -> int | None:
    """Return how many samples a sampler draws; None where it cannot tell."""
    if not isinstance(sampler, Sized):
        return None
    try:
        return len(sampler)
    except Exception:  # a sampler of the user's own may raise whatever it likes
        return None


def _label_runs(dataset: object) -> tuple[float, float] | None:
    """Return the mean length of runs of a label in a dataset, and that in a random order.

    None where the dataset does not hold its labels as a list of whole numbers.
    """
    try:
        labels = _labels(dataset)
    except Exception:  # a dataset of the user's own may raise whatever it likes
        return None
    if labels is None or labels.ndim != 1 or labels.size < 2 or labels.dtype.kind not in "iub":
        return None
    shares = np.unique(labels, return_counts=True)[1] / labels.size
    other = 1.0 - float(np.square(shares).sum())
    if other == 0.0:
        return None
    return labels.size / (1 + np.count_nonzero(np.diff(labels))), 1.0 / other


def _labels(dataset: object) -> FloatArray | None:
    indices, inner = getattr(dataset, "indices", None), getattr(dataset, "dataset", None)
    if indices is not None and inner is not None:
        labels = _labels(inner)
        return None if labels is None else labels[np.asarray(indices)]
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return np.asarray(getattr(dataset, name))
    tensors: tuple[object, ...] = getattr(dataset, "tensors", ())
    return np.asarray(tensors[-1]) if len(tensors) > 1 else None
