"""Why inputs in eval mode do not match the running statistics, if no other rule has said it.

:func:`cause_of_drift` asks the signs in order, each a function that knows one cause: what speaks
for it, in words and numbers, and the fix that belongs to it. The first that speaks is believed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bnguard.findings import Evidence, Finding, Fix
from bnguard.layers.distances import log_variance_ratio, shift_std, without_initial
from bnguard.observe.history import BatchWindow, EvalWindow, History, LayerHistory
from bnguard.rules.measurements import (
    DRIFT_LIMITS,
    FITTING_SHARE,
    MAX_BETWEEN_SHARE,
    Distance,
    DriftLimits,
    distance_of,
    is_representative,
    is_sampling,
    jump_of_network,
)

# Share of a drift that the newest batches have to show too where moving weights make it: those of
# networks that learn as usual show at most 0.26 of what other data make at the first layer, and 0.8
# and more where the statistics lag.
_MOVED_SHARE = 0.35


@dataclass(frozen=True)
class Drift:
    """A layer whose eval moments do not fit its running statistics, and what surrounds it.

    Attributes:
        layer: The layer.
        seen: What arrived at it in eval mode.
        distance: How far that is from the running statistics.
        limits: What it was held against.
        first: The layer that was called first, of those that training reached.
    """

    layer: LayerHistory
    seen: EvalWindow
    distance: Distance
    limits: DriftLimits
    first: LayerHistory

    @property
    def is_trained(self) -> bool:
        """Whether batches of training reached the layer."""
        return self.layer.window is not None

    def from_batches(self) -> Distance | None:
        """Return how far what arrived is from the newest batches of training."""
        window = self.layer.window
        if window is None or self.distance.worst is None:
            return None
        distance = self.limits.distance(self.seen, window.mean, window.var_unbiased, self.layer.eps)
        return None if distance.worst is None else distance

    def without_initial(self) -> Distance | None:
        """Return how far what arrived is from what training alone put into the statistics."""
        weight, running = self.layer.initial_weight_when_evaluated, self.seen.running
        if weight is None or weight >= 1.0:
            return None
        mean, var = without_initial(running.mean, running.var, weight)
        return self.limits.distance(self.seen, mean, var, self.layer.eps)

    def at_first(self) -> Drift:
        """Return how far the layer that was called first is off; this, where that is not known."""
        seen = self.first.evaluated
        if seen is None or self.layer is self.first:
            return self
        running = seen.running
        distance = self.limits.distance(seen, running.mean, running.var, self.first.eps)
        return dataclasses.replace(self, layer=self.first, seen=seen, distance=distance)

    def is_moved(self) -> bool:
        """Return whether the newest batches lie as far from the running statistics as it does.

        Nothing but the weights takes the batches of training away from their own average, once the
        initial values are forgotten.
        """
        window, running = self.layer.window, self.seen.running
        if window is None:
            return False
        shift = np.abs(shift_std(window.mean, running.mean, running.var, self.layer.eps))
        ratio = np.abs(log_variance_ratio(window.var_unbiased, running.var, self.layer.eps))
        moved = dataclasses.replace(self.distance, shift=shift, ratio=ratio)
        return moved.excess > _MOVED_SHARE * self.distance.excess


# How many times its own uncertainty the average has to be off before it is more than noise.
_NOISE_FACTOR = 3.0

# Share of the distance from the running statistics at which the newest batches are nearer by far.
# Where the data differ, the two distances are alike.
_NEARER = 0.6

# How much wider the batch means spread over the window than between neighbours, from which the
# weights move within it: of 30 independent batches one channel in a thousand reaches 1.5.
_MIN_TREND = 2.0

# What helps statistics that lag.
_CATCH_UP = Fix(
    "recalibrate before evaluation (BatchNormRecalibration); a larger momentum, or a falling "
    "learning rate",
    "recalibrate",
)

# Spread of the batch means, in σ, from which small batches count as noisy once there is a drift:
# that of 11 independent samples. BN202 accuses from 0.42 on, without one.
_MIN_NOISE_STD = 0.3
_MAX_SAMPLES = 11


@dataclass(frozen=True)
class Cause:
    """Why statistics do not fit.

    Attributes:
        reason: The cause and the numbers that speak for it: the end of a sentence, "because …".
        fix: What belongs to it.
        evidence: The numbers, each against what it is held to.
        is_vague: Whether it says that there is a difference, and little of where it comes from.
    """

    reason: str
    fix: Fix
    evidence: tuple[Evidence, ...] = ()
    is_vague: bool = False

    @classmethod
    def of(cls, finding: Finding) -> Cause:
        """Return the cause that another rule has found."""
        reason = f"because of {finding.code} {finding.name}: {finding.message}"
        return cls(reason, finding.fix, (finding.evidence, *finding.reasons))


def cause_of_gap(history: History) -> Cause | None:
    """Return why the two modes disagree: why the statistics that fit worst do not."""
    called, entrance = history.layers_in_order, history.first_trained
    drifts = [
        Drift(layer, layer.evaluated, distance, DRIFT_LIMITS, entrance)
        for layer in called
        for distance in [distance_of(layer)]
        if entrance is not None
        and layer.evaluated is not None
        and distance is not None
        and distance.excess > FITTING_SHARE
    ]
    worst = max(drifts, key=lambda drift: drift.distance.excess, default=None)
    cause = None if worst is None else cause_of_drift(worst)
    if worst is None or cause is None:
        return None
    return dataclasses.replace(
        cause,
        reason=f"most of all at {worst.layer.name or 'the layer'} ({worst.distance.worst}), "
        f"{cause.reason}",
    )


def doubt_of_gap(history: History, cause: Cause | None) -> Cause | None:
    """Return that evaluation is sorted, where a layer shows it: its batches are each unlike all.

    Args:
        history: What was seen.
        cause: Why the modes disagree, as far as known. What speaks for itself does not depend on an
            evaluation that may as well be unsorted.
    """
    seen = [layer.evaluated for layer in history.layers if layer.evaluated is not None]
    worst = max(seen, key=lambda window: window.between_share, default=None)
    if worst is None or is_representative(worst):
        return None
    return _sorted(worst) if worst.is_between_shown or _is_vague(cause) else None


def doubt_of_drift(drift: Drift, found: Finding | None) -> Cause | None:
    """Return that evaluation is sorted, where that may be all that a drift is.

    Args:
        drift: The drift.
        found: What another rule has found to be its cause.
    """
    if not _may_be_sorted(drift):
        return None
    is_vague = found is None and _is_vague(cause_of_drift(drift))
    return _sorted(drift.seen) if drift.seen.is_between_shown or is_vague else None


def cause_in_chain(drift: Drift, first: Drift) -> Cause | None:
    """Return why a layer has drifted: what goes wrong at the first that has reaches it too."""
    cause = cause_of_drift(first)
    if cause is None or drift is first:
        return cause
    where = first.layer.name or "the layer before"
    return dataclasses.replace(cause, reason=f"which begins at {where}, {cause.reason}")


def cause_of_drift(drift: Drift) -> Cause | None:
    """Return why a layer's statistics do not fit; None if nothing speaks for any cause."""
    causes = (sign(drift) for sign in _SIGNS)
    return next((cause for cause in causes if cause is not None), None)


def sorted_evaluation(drift: Drift) -> Cause | None:
    """The batches looked at are not like those that were not: nothing can be said of the rest."""
    is_shown = drift.seen.is_between_shown and _may_be_sorted(drift)
    return _sorted(drift.seen) if is_shown else None


def unsure_evaluation(drift: Drift) -> Cause | None:
    """The batches looked at are too few and small to tell whether they stand for the rest."""
    return _sorted(drift.seen) if _may_be_sorted(drift) else None


def noisy_average(drift: Drift) -> Cause | None:
    """The running average holds so few batches that it is as uncertain as it is off."""
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
    samples = "" if layer.samples is None else f" of {layer.samples} samples"
    return Cause(
        f"because momentum {layer.momentum:g} averages some {2 / layer.momentum - 1:.0f} batches"
        f"{samples}, which leaves the mean uncertain by {uncertainty:.2g} σ",
        Fix("recalibrate; a smaller momentum or larger batches for the next run", "recalibrate"),
        (Evidence("uncertainty of the average", uncertainty, shift.value / _NOISE_FACTOR, "σ"),),
    )


def initial_values(drift: Drift) -> Cause | None:
    """Little is left of the initial mean and variance, but they are large against the data."""
    weight, rest = drift.layer.initial_weight_when_evaluated, drift.without_initial()
    if not weight or rest is None or rest.worst is None:
        return None
    if rest.excess > _NEARER * drift.distance.excess:
        return None
    return Cause(
        f"because {100 * weight:.2g}% of them is still the initial mean 0 and variance 1, much "
        "compared with those of the data: without it they match evaluation "
        f"({rest.worst.measure} then {rest.worst.value:.2g})",
        Fix("train on, or recalibrate; data and weights of a usual scale next time", "recalibrate"),
        (rest.worst,),
    )


def changing_network(drift: Drift) -> Cause | None:
    """Each batch takes another path to the layer, and the running average mixes them."""
    jump = jump_of_network(drift.layer)
    if jump is None:
        return None
    return Cause(
        "because the network in front of it changes from batch to batch, as a supernet does: "
        f"the mean of a batch jumps by {jump:.2g} σ, and the data do not",
        Fix("recalibrate for what is evaluated, with each path on its own", "recalibrate"),
        (Evidence("spread of the batch means", jump, _MIN_NOISE_STD, "σ"),),
    )


def lag(drift: Drift) -> Cause | None:
    """The weights have moved on, and the average has not followed: the newest batches fit."""
    batches = drift.from_batches()
    if batches is None or batches.worst is None:
        return None
    # Where weights move within the window as well, its average is only nearer than the running one.
    if batches.excess > _NEARER * drift.distance.excess:
        return None
    momentum, worst = drift.layer.momentum, batches.worst
    span = (
        "a plain average over all updates"
        if momentum is None
        else f"momentum {momentum:g} looks back over some {1 / max(momentum, 1e-12):.0f} updates"
    )
    return Cause(
        "because they lag behind the weights, since the newest batches of training agree with it "
        f"({worst.measure} against them {worst.value:.2g}); {span}",
        _CATCH_UP,
        (worst,),
    )


def dropout(drift: Drift) -> Cause | None:
    """What is dropped before the layer, in training alone, makes the variance there larger."""
    batches, window = drift.from_batches(), drift.layer.window
    if not drift.seen.dropout_before or window is None or batches is None or not batches.is_beyond:
        return None
    with np.errstate(all="ignore"):
        is_smaller = np.nanmedian(drift.seen.var_unbiased - window.var_unbiased) < 0.0
    worst = batches.worst
    if worst is None or worst.unit == "σ" or not is_smaller:
        return None
    return Cause(
        f"because {drift.seen.dropout_before} is before the layer, and acts in training alone: "
        "evaluation has less variance than the newest batches of training "
        f"({worst.measure} against them {worst.value:.2g})",
        Fix("move dropout behind the last BN layer, or lower its rate, and train on"),
        (worst,),
    )


def moving_weights(drift: Drift) -> Cause | None:
    """The weights move so fast that the window of the newest batches is behind them as well."""
    window, first = drift.layer.window, drift.at_first()
    trend = math.nan if window is None else window.trend
    if not trend > _MIN_TREND:
        return None
    # At the first layer weights that move show in training as well; data that differ do not.
    if first.distance.excess > FITTING_SHARE and not first.is_moved():
        return None
    return Cause(
        "because they lag behind weights that move fast: over the newest batches of training the "
        f"means spread {trend:.2g} times as much as from one batch to the next",
        _CATCH_UP,
        (Evidence("spread over that from batch to batch", trend, _MIN_TREND),),
    )


def small_batches(drift: Drift) -> Cause | None:
    """The statistics of each batch are so noisy that training and evaluation differ by them.

    The layers before it count too: what they normalise away in training reaches it in eval mode.
    """
    noises = [
        (_noise_std(layer.window), layer)
        for layer in (drift.layer, drift.first)
        if layer.window is not None and (layer.samples or math.inf) <= _MAX_SAMPLES
    ]
    noisy = [known for known in noises if known[0] > _MIN_NOISE_STD]
    if not noisy:
        return None
    noise, layer = max(noisy, key=lambda known: known[0])
    where = "" if layer is drift.layer else f" at {layer.name or 'the first layer'}"
    return Cause(
        f"because the mean of a batch of {layer.samples} samples jumps by {noise:.2g} σ{where}, so "
        "that training shows the layers after it something else",
        Fix("enlarge or synchronise the batches (SyncBatchNorm), or use GroupNorm"),
        (Evidence("spread of the batch means", noise, _MIN_NOISE_STD, "σ"),),
    )


def other_data(drift: Drift) -> Cause | None:
    """At the first layer, evaluation is unlike the batches of training."""
    first = drift.at_first()
    batches = first.from_batches()
    if batches is None or batches.worst is None or first.layer is not drift.first:
        return None
    if drift.layer is not drift.first and not min(first.distance.excess, batches.excess) > (
        FITTING_SHARE
    ):
        return None
    return Cause(
        "because the data differ, or the weights have just moved: at the first BN layer already "
        "evaluation is not what the newest batches of training were "
        f"({batches.worst.measure} against them {batches.worst.value:.2g})",
        Fix(
            "recalibrate on training data; where that does not help, compare mean and deviation of "
            "a training and an evaluation batch"
        ),
        (batches.worst,),
        is_vague=True,
    )


def other_path(drift: Drift) -> Cause | None:
    """The first layer agrees, a later one does not: something between depends on the mode."""
    batches = drift.from_batches()
    if batches is None or batches.worst is None:
        return None
    return Cause(
        "because what lies between this and the BN layers before, which agree, acts otherwise in "
        "eval mode, or the data differ: it is not what the newest batches of training were "
        f"({batches.worst.measure} against them {batches.worst.value:.2g})",
        Fix("look for dropout and branches on self.training before the layer, then at the data"),
        (batches.worst,),
        is_vague=True,
    )


# The first says that nothing can be said, the last is what is left when all else fits.
_SIGNS: tuple[Callable[[Drift], Cause | None], ...] = (
    sorted_evaluation,
    noisy_average,
    initial_values,
    changing_network,
    lag,
    dropout,
    moving_weights,
    small_batches,
    unsure_evaluation,
    other_data,
    other_path,
)


def _may_be_sorted(drift: Drift) -> bool:
    return is_sampling(drift.seen, drift.distance, drift.seen.running.var, drift.layer.eps)


def _is_vague(cause: Cause | None) -> bool:
    return cause is None or cause.is_vague


def _sorted(seen: EvalWindow) -> Cause:
    do = "do" if seen.is_between_shown else "may"
    doubt = "" if seen.is_between_shown else ", which so few samples cannot tell"
    return Cause(
        f"because the {seen.batches} batches of evaluation that were looked at {do} not stand for "
        f"the rest: {seen.between_share:.0%} of the variance between samples lies between batches, "
        f"as where they are sorted{doubt}",
        Fix("shuffle the evaluation data once, or look at more batches (eval_batches), then judge"),
        (
            Evidence(
                "variance between batches", 100 * seen.between_share, 100 * MAX_BETWEEN_SHARE, "%"
            ),
        ),
        is_vague=True,
    )


def _noise_std(window: BatchWindow) -> float:
    """Return the spread of the batch means in σ, the median over channels; NaN if not known."""
    known = window.noise_std[np.isfinite(window.noise_std)]
    return float(np.median(known)) if known.size else math.nan
