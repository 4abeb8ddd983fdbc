"""Why inputs in eval mode do not match the running statistics, if no other rule has found it.

:func:`cause_of_drift` asks the functions in ``_SIGNS`` in order. Each knows one cause: the evidence
for it, in words and numbers, and its fix. The first that finds evidence wins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, counted
from bnguard.layers.distances import log_variance_ratio, shift_std, without_initial
from bnguard.observe.history import BatchWindow, EvalWindow, History, LayerHistory
from bnguard.rules.measurements import (
    DRIFT_LIMITS,
    FITTING_SHARE,
    MAX_BETWEEN_SHARE,
    Distance,
    DriftLimits,
    distance_of,
    is_harmful,
    is_known,
    is_representative,
    is_sampling,
    jump_of_network,
)

# Share of a drift that the newest batches show too if moving weights are its cause. In networks
# that learn as usual it is at most 0.26 of what other data cause at the first layer, and 0.8 and
# more if the statistics lag.
_MOVED_SHARE = 0.35


@dataclass(frozen=True)
class Drift:
    """A layer whose eval moments do not match its running statistics.

    Attributes:
        layer: The layer.
        seen: Its inputs in eval mode.
        distance: How far those are from the running statistics.
        limits: The limits of the distance.
        first: The layer that was called first, of those that training reached.
        before: The layer that was called before it, if any.
    """

    layer: LayerHistory
    seen: EvalWindow
    distance: Distance
    limits: DriftLimits
    first: LayerHistory
    before: LayerHistory | None

    @property
    def is_trained(self) -> bool:
        """Whether batches of training reached the layer."""
        return self.layer.window is not None

    def from_batches(self) -> Distance | None:
        """Return how far the inputs in eval mode are from the newest training batches."""
        window = self.layer.window
        if window is None or self.distance.worst is None:
            return None
        distance = self.limits.distance(self.seen, window.mean, window.var_unbiased, self.layer.eps)
        return None if distance.worst is None else distance

    def without_initial(self) -> Distance | None:
        """Return how far the inputs are from the statistics without their initial part."""
        weight, running = self.layer.initial_weight_when_evaluated, self.seen.running
        if weight is None or weight >= 1.0:
            return None
        mean, var = without_initial(running.mean, running.var, weight)
        return self.limits.distance(self.seen, mean, var, self.layer.eps)

    def at_first(self) -> Drift:
        """Return the drift of the layer that was called first; this one if that is unknown."""
        seen = self.first.evaluated
        if seen is None or self.layer is self.first:
            return self
        running = seen.running
        distance = self.limits.distance(seen, running.mean, running.var, self.first.eps)
        return dataclasses.replace(self, layer=self.first, seen=seen, distance=distance)

    def is_moved(self) -> bool:
        """Return whether the newest training batches have moved from the running statistics too.

        Once the initial values are forgotten, only moving weights do that.
        """
        window, running = self.layer.window, self.seen.running
        if window is None:
            return False
        shift = np.abs(shift_std(window.mean, running.mean, running.var, self.layer.eps))
        ratio = np.abs(log_variance_ratio(window.var_unbiased, running.var, self.layer.eps))
        moved = dataclasses.replace(self.distance, shift=shift, ratio=ratio)
        return moved.excess > _MOVED_SHARE * self.distance.excess


# Up to this many times its own uncertainty, an average is off by noise alone.
_NOISE_FACTOR = 3.0

# Share of the distance from the running statistics up to which the newest batches are clearly
# nearer. If the data differ, the two distances are similar.
_NEARER = 0.6

# The weights move within the window if batch means spread this many times wider over it than
# between neighbours: of 30 independent batches one channel in a thousand reaches 1.5.
_MIN_TREND = 2.0

_CATCH_UP = Fix(
    "recalibrate before evaluation (BatchNormRecalibration), or use a larger momentum or a falling "
    "learning rate",
    "recalibrate",
)
# A larger momentum would make an average of small batches noisier.
_CATCH_UP_SMALL = Fix(
    "recalibrate before evaluation (BatchNormRecalibration), or use larger batches or a falling "
    "learning rate",
    "recalibrate",
)

# Spread of the batch means, in σ, from which small batches are noisy if there is a drift: that of
# 11 independent samples. Without a drift, BN202 reports from 0.42 on.
_MIN_NOISE_STD = 0.3
_MAX_SAMPLES = 11

# Share of a drift that the layer before has already if it grows from layer to layer. In networks
# trained with batches of 4 it is 0.8 and more.
_GROWING_SHARE = 0.5

# A drift this many times larger than where it begins has another cause on its way.
_GROWN = 3.0

# Weight in the average from which a batch of one sample moves it by as much as a drift.
_MIN_WEIGHT = 0.05

# Usual batches for each that holds a single sample, at least: an epoch has one.
_MIN_USUAL = 8

_SLOWER = Fix(
    "recalibrate; use larger batches or a smaller learning rate in the next run", "recalibrate"
)

_LARGER = Fix("enlarge or synchronise the batches (SyncBatchNorm), or use GroupNorm")


@dataclass(frozen=True)
class Cause:
    """Why statistics do not match.

    Attributes:
        reason: The cause with its numbers: the end of a sentence, "because …".
        fix: Its fix.
        evidence: The numbers, each with its limit.
        is_vague: Whether it names a difference, but hardly where it comes from.
    """

    reason: str
    fix: Fix
    evidence: tuple[Evidence, ...] = ()
    is_vague: bool = False

    @classmethod
    def of(cls, finding: Finding) -> Cause:
        """Return the cause that another rule found."""
        reason = f"because of {finding.code} {finding.name}: {finding.message}"
        return cls(reason, finding.fix, (finding.evidence, *finding.reasons))


def cause_of_gap(history: History) -> Cause | None:
    """Return why the two modes disagree: the cause at the layer that matches worst."""
    entrance = history.first_trained
    if entrance is None:
        return None
    drifts: list[Drift] = []
    before: LayerHistory | None = None
    for layer in history.layers_in_order:
        seen, distance = layer.evaluated, distance_of(layer)
        if seen is not None and distance is not None and distance.excess > FITTING_SHARE:
            drifts.append(Drift(layer, seen, distance, DRIFT_LIMITS, entrance, before))
        before = layer
    worst = max(drifts, key=lambda drift: drift.distance.excess, default=None)
    cause = None if worst is None else cause_of_drift(worst)
    if worst is None or cause is None:
        return None
    return dataclasses.replace(
        cause,
        reason=f"mostly at {worst.layer.name or 'the layer'} ({worst.distance.worst}), "
        f"{cause.reason}",
    )


def doubt_of_gap(history: History, cause: Cause | None) -> Cause | None:
    """Return that evaluation may be sorted, if the batches at a layer differ; else None.

    Args:
        history: What was observed.
        cause: Why the modes disagree, if known. A cause that is not vague outweighs a suspicion.
    """
    seen = [layer.evaluated for layer in history.layers if layer.evaluated is not None]
    worst = max(seen, key=lambda window: window.between_share, default=None)
    if worst is None or is_representative(worst):
        return None
    return _describe_sorted(worst) if worst.is_between_shown or _is_vague(cause) else None


def doubt_of_drift(drift: Drift, found: Finding | None) -> Cause | None:
    """Return that evaluation may be sorted, if that alone may explain a drift; else None.

    Args:
        drift: The drift.
        found: The cause that another rule found.
    """
    if not _may_be_sorted(drift):
        return None
    is_vague = found is None and _is_vague(cause_of_drift(drift))
    return _describe_sorted(drift.seen) if drift.seen.is_between_shown or is_vague else None


def cause_in_chain(drift: Drift, first: Drift) -> Cause | None:
    """Return why a layer has drifted: the cause at the first that did, which reaches it too.

    Unless small batches make a drift much larger on its way.
    """
    cause = cause_of_drift(first)
    if cause is None or drift is first:
        return cause
    is_moving = drift.layer.window is not None and drift.layer.window.trend > _MIN_TREND
    if drift.distance.excess > _GROWN * first.distance.excess and not is_moving:
        growing = growing_drift(drift)
        if growing is not None:
            return growing
    where = first.layer.name or "the layer before"
    return dataclasses.replace(cause, reason=f"which begins at {where}, {cause.reason}")


def cause_of_drift(drift: Drift) -> Cause | None:
    """Return why a layer's statistics do not match; None if there is no evidence for a cause."""
    causes = (sign(drift) for sign in _SIGNS)
    return next((cause for cause in causes if cause is not None), None)


def sorted_evaluation(drift: Drift) -> Cause | None:
    """Check whether the batches that were read clearly do not represent the others."""
    is_shown = drift.seen.is_between_shown and _may_be_sorted(drift)
    return _describe_sorted(drift.seen) if is_shown else None


def unsure_evaluation(drift: Drift) -> Cause | None:
    """Check whether the batches that were read may be too few to represent the others."""
    return _describe_sorted(drift.seen) if _may_be_sorted(drift) else None


def noisy_average(drift: Drift) -> Cause | None:
    """Check whether the running average has so few batches that it is as uncertain as it is off."""
    layer, window, batches = drift.layer, drift.layer.window, drift.from_batches()
    if window is None or batches is None or batches.is_beyond:
        return None
    if layer.momentum is None or not 0.0 < layer.momentum <= 1.0:
        return None
    # The variance of an exponential average of independent values: a / (2 - a) of theirs.
    uncertainty = _noise_std(window) * math.sqrt(layer.momentum / (2.0 - layer.momentum))
    shift = drift.distance.worst
    if shift is None or shift.unit != "σ" or not shift.value <= _NOISE_FACTOR * uncertainty:
        return None
    batches_averaged = counted(round(2 / layer.momentum - 1), "batch", "batches")
    samples = "" if layer.samples is None else f" of {counted(layer.samples, 'sample')}"
    return Cause(
        f"because momentum {layer.momentum:g} averages some {batches_averaged}{samples}, which "
        f"leaves the mean uncertain by {uncertainty:.2g} σ",
        Fix("recalibrate; use a smaller momentum or larger batches in the next run", "recalibrate"),
        (Evidence("uncertainty of the average", uncertainty, shift.value / _NOISE_FACTOR, "σ"),),
    )


def initial_values(drift: Drift) -> Cause | None:
    """Check whether the rest of the initial mean and variance is large for data of this scale."""
    weight, rest = drift.layer.initial_weight_when_evaluated, drift.without_initial()
    if not weight or rest is None or rest.worst is None:
        return None
    if rest.excess > _NEARER * drift.distance.excess:
        return None
    return Cause(
        f"because {100 * weight:.2g}% of them are still the initial mean 0 and variance 1, a lot "
        "for data of this scale: without that part they match evaluation "
        f"({rest.worst.reading})",
        Fix("train longer, or recalibrate; standardise the data in the next run", "recalibrate"),
        (rest.worst,),
    )


def changing_network(drift: Drift) -> Cause | None:
    """Check whether each batch takes another path to the layer, which the average mixes."""
    jump = jump_of_network(drift.layer)
    if jump is None:
        return None
    return Cause(
        "because the network before the layer changes from batch to batch, as a supernet does: "
        f"the batch means jump by {jump:.2g} σ, and the data do not",
        Fix("recalibrate each path separately before it is evaluated", "recalibrate"),
        (Evidence("spread of the batch means", jump, _MIN_NOISE_STD, "σ"),),
    )


def single_samples(drift: Drift) -> Cause | None:
    """Check whether a batch of one sample, as the last of an epoch, entered the average."""
    layer, counts = drift.layer, drift.layer.values_per_channel
    typical, samples, momentum = layer.typical_values_per_channel, layer.samples, layer.momentum
    if not typical or not samples or _is_small(layer) or (momentum or 0.0) < _MIN_WEIGHT:
        return None
    batches = counts.get(typical // samples, 0) if typical % samples == 0 else 0
    if not batches or sum(counts.values()) < batches * _MIN_USUAL:
        return None
    return Cause(
        f"because {counted(batches, 'batch', 'batches')} of {sum(counts.values()):,} held a single "
        f"sample, as the last of an epoch, and each has the weight {momentum:g} in the average",
        Fix("use DataLoader(..., drop_last=True), and recalibrate", "recalibrate"),
        (Evidence("samples in the smallest batch", 1, 2, is_minimum=True),),
    )


def lag(drift: Drift) -> Cause | None:
    """Check whether the weights moved and the average did not follow: the newest batches match."""
    batches = drift.from_batches()
    if batches is None or batches.worst is None:
        return None
    # If weights move within the window too, its average is nearer than the running one, no more.
    if batches.excess > _NEARER * drift.distance.excess:
        return None
    momentum, worst = drift.layer.momentum, batches.worst
    span = (
        "a plain average over all updates"
        if momentum is None
        else f"momentum {momentum:g} averages some {1 / max(momentum, 1e-12):.0f} updates"
    )
    return Cause(
        "because they lag behind the weights: the newest training batches match evaluation "
        f"({worst.reading}); {span}",
        _catch_up(drift.layer),
        (worst,),
    )


def dropout(drift: Drift) -> Cause | None:
    """Check whether dropout before the layer makes the variance larger, in training only."""
    batches, window = drift.from_batches(), drift.layer.window
    if not drift.seen.dropout_before or window is None or batches is None or not batches.is_beyond:
        return None
    with np.errstate(all="ignore"):
        is_smaller = np.nanmedian(drift.seen.var_unbiased - window.var_unbiased) < 0.0
    worst = batches.worst
    if worst is None or worst.unit == "σ" or not is_smaller:
        return None
    return Cause(
        f"because {drift.seen.dropout_before} before the layer acts in training only: evaluation "
        "has less variance than the newest training batches "
        f"({worst.reading})",
        Fix("move dropout after the last BN layer, or lower its rate, and train on"),
        (worst,),
    )


def moving_weights(drift: Drift) -> Cause | None:
    """Check whether the weights move so fast that the window of newest batches lags too."""
    window, first = drift.layer.window, drift.at_first()
    trend = math.nan if window is None else window.trend
    if not trend > _MIN_TREND:
        return None
    # At the first layer, moving weights show in training too; other data do not.
    if first.distance.excess > FITTING_SHARE and not first.is_moved():
        return None
    return Cause(
        "because they lag behind weights that move fast: the means of the newest training batches "
        f"spread {trend:.2g} times as much as from one batch to the next",
        _catch_up(drift.layer),
        (Evidence("spread, relative to that from batch to batch", trend, _MIN_TREND),),
    )


def small_batches(drift: Drift) -> Cause | None:
    """Check whether batch statistics are so noisy that training and evaluation differ by them.

    The first layer counts too: what it normalises away in training reaches others in eval mode.
    """
    noises = [
        (_noise_std(layer.window), layer)
        for layer in (drift.layer, drift.first)
        if layer.window is not None and _is_small(layer)
    ]
    noisy = [known for known in noises if known[0] > _MIN_NOISE_STD]
    if not noisy:
        return None
    noise, layer = max(noisy, key=lambda known: known[0])
    where = "" if layer is drift.layer else f" at {layer.name or 'the first layer'}"
    return Cause(
        f"because the mean of a batch of {counted(layer.samples or 0, 'sample')} jumps by "
        f"{noise:.2g} σ{where}, so later layers get other inputs in training than in evaluation",
        _LARGER,
        (Evidence("spread of the batch means", noise, _MIN_NOISE_STD, "σ"),),
    )


def growing_drift(drift: Drift) -> Cause | None:
    """Check whether the drift grows from layer to layer, as what small batches subtract adds up.

    A branch or dropout makes it jump at one layer.
    """
    batches, samples = drift.from_batches(), drift.layer.samples or 0
    if batches is None or batches.worst is None or not _is_small(drift.layer):
        return None
    if not _is_growing(drift):
        return None
    return Cause(
        f"because batches of {counted(samples, 'sample')} are small: the drift grows from layer to "
        "layer, as what each batch subtracts in training reaches the next layers in eval mode",
        _LARGER,
        (Evidence("samples per batch", samples, _MAX_SAMPLES + 1, is_minimum=True),),
    )


def other_data(drift: Drift) -> Cause | None:
    """Check whether evaluation differs from the training batches at the first layer."""
    first = drift.at_first()
    batches = first.from_batches()
    if batches is None or batches.worst is None or first.layer is not drift.first:
        return None
    if drift.layer is not drift.first and not min(first.distance.excess, batches.excess) > (
        FITTING_SHARE
    ):
        return None
    return Cause(
        "because the data differ, or the weights have just moved: evaluation differs from the "
        "newest training batches at the first BN layer already "
        f"({batches.worst.reading})",
        Fix(
            "recalibrate on training data; if that does not help, compare mean and standard "
            "deviation of a training and an evaluation batch"
        ),
        (batches.worst,),
        is_vague=True,
    )


def other_path(drift: Drift) -> Cause | None:
    """Check whether something between the first layer, which matches, and this one differs.

    If the modes agree on training batches, it is the data.
    """
    batches, gap = drift.from_batches(), drift.layer.run.mode_gap_in_training
    if batches is None or batches.worst is None:
        return None
    far = f"evaluation differs from the newest training batches ({batches.worst.reading})"
    if gap is not None and is_known(gap) and not is_harmful(gap):
        why = "the data differ, as by augmentation: the modes agree on training batches"
        fix = Fix("compare the augmentation and preprocessing of training with evaluation")
    elif gap is not None and is_harmful(gap) and _is_growing(drift):
        why = "the drift grows from layer to layer, and the modes differ on training batches too"
        fix = _SLOWER
    else:
        why = (
            "something between this and the earlier BN layers, which match, differs in eval mode, "
            "or the data differ, as by augmentation"
        )
        fix = Fix(
            "compare the augmentation of training with evaluation, and check for dropout and "
            "branches on self.training before the layer"
        )
    return Cause(f"because {why}; {far}", fix, (batches.worst,), is_vague=True)


# In order: the first decides that nothing is certain, the last is what remains.
_SIGNS: tuple[Callable[[Drift], Cause | None], ...] = (
    sorted_evaluation,
    noisy_average,
    initial_values,
    changing_network,
    single_samples,
    lag,
    dropout,
    moving_weights,
    small_batches,
    unsure_evaluation,
    growing_drift,
    other_data,
    other_path,
)


def _may_be_sorted(drift: Drift) -> bool:
    return is_sampling(drift.seen, drift.distance, drift.seen.running.var, drift.layer.eps)


def _is_vague(cause: Cause | None) -> bool:
    return cause is None or cause.is_vague


def _describe_sorted(seen: EvalWindow) -> Cause:
    do = "do" if seen.is_between_shown else "may"
    doubt = "" if seen.is_between_shown else "; with so few samples this may be chance"
    return Cause(
        f"because the {seen.batches} evaluation batches that were read {do} not represent the "
        f"rest: {seen.between_share:.0%} of the variance between samples is between batches, as in "
        f"sorted data{doubt}",
        Fix("shuffle the evaluation data once, or read more batches (eval_batches)"),
        (
            Evidence(
                "variance between batches", 100 * seen.between_share, 100 * MAX_BETWEEN_SHARE, "%"
            ),
        ),
        is_vague=True,
    )


def _is_growing(drift: Drift) -> bool:
    """Return whether the first layer matches, and the one before has much of the drift already."""
    before = None if drift.before is None else distance_of(drift.before)
    if before is None or drift.at_first().distance.excess > FITTING_SHARE:
        return False
    return before.excess >= _GROWING_SHARE * drift.distance.excess


def _is_small(layer: LayerHistory) -> bool:
    return (layer.samples or math.inf) <= _MAX_SAMPLES


def _catch_up(layer: LayerHistory) -> Fix:
    return _CATCH_UP_SMALL if _is_small(layer) else _CATCH_UP


def _noise_std(window: BatchWindow) -> float:
    """Return the spread of the batch means in σ, the median over channels; NaN if unknown."""
    known = window.noise_std[np.isfinite(window.noise_std)]
    return float(np.median(known)) if known.size else math.nan
