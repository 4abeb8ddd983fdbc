"""Measures that several rules share: drift of the eval moments, harm of the mode gap."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bnguard.findings import LOGARITHM, Evidence
from bnguard.layers.distances import (
    FloatArray,
    initial_shift_std,
    largest,
    log_variance_ratio,
    shift_std,
)
from bnguard.observe.history import (
    EvalWindow,
    History,
    LayerHistory,
    ModeGap,
    Run,
    RunningStatistics,
)

# The modes disagree if, beyond what sampling explains, the outputs change by more than the first
# limit, or by more than the second while predictions flip. BN302 has the figures.
MAX_EXCESS_CHANGE = 0.75
MAX_EXCESS_CHANGE_WITH_FLIPS = 0.3
MAX_FLIPPED_SHARE = 0.12
SAMPLING_FACTOR = 2.0

# The same if the cause is known. In 184 of 252 small networks, recalibration gained less than 1 %
# accuracy: it changed the outputs of these by up to 0.36 σ, and 6.5 % of the predictions.
HARMFUL_CHANGE = 0.4
HARMFUL_FLIPPED_SHARE = 0.07

# Samples of evaluation from which the part that sampling explains is known well enough.
MIN_GAP_SAMPLES = 16

# Share of the variance between samples that is between the batches of an evaluation, beyond which
# the batches that were read do not represent the rest. BN301 has the figures.
MAX_BETWEEN_SHARE = 0.15

# Shift of a running mean by the rest of the initial mean 0, in σ, beyond which statistics have not
# settled, however little of it is left: the limit of a drift (BN301).
MAX_INITIAL_SHIFT_STD = 1.0

# While training goes on, harm counts once this many evaluations in a row show it.
LASTING_EVALUATIONS = 4


def excess_change(gap: ModeGap) -> float:
    """Return the change of the outputs between the modes that sampling does not explain."""
    sampling = SAMPLING_FACTOR * (gap.sampling_change or 0.0)
    if not np.isfinite(sampling):
        return gap.relative_change
    # The root of the difference of two squares, which themselves may overflow.
    rest = max(0.0, gap.relative_change - sampling)
    return float(np.sqrt(rest) * np.sqrt(max(0.0, gap.relative_change + sampling)))


def is_harmful(
    gap: ModeGap,
    *,
    max_change: float = MAX_EXCESS_CHANGE,
    max_change_with_flips: float = MAX_EXCESS_CHANGE_WITH_FLIPS,
    max_flipped_share: float = MAX_FLIPPED_SHARE,
) -> bool:
    """Return whether the two modes give different answers, by more than sampling explains."""
    # Sampling does not make outputs NaN or infinite.
    is_judged = is_known(gap) or not np.isfinite(gap.relative_change)
    return is_judged and _exceeds(gap, max_change, max_change_with_flips, max_flipped_share)


def is_known(gap: ModeGap) -> bool:
    """Return whether it is known how much of a gap sampling explains."""
    return gap.sampling_change is not None and gap.samples >= MIN_GAP_SAMPLES


def _exceeds(
    gap: ModeGap, max_change: float, max_change_with_flips: float, max_flipped_share: float
) -> bool:
    excess = excess_change(gap)
    has_flips = gap.flipped_share is not None and gap.flipped_share > max_flipped_share
    return excess > max_change or (has_flips and excess > max_change_with_flips)


def is_known_harmless(run: Run) -> bool:
    """Return whether the mode gap was measured, and shows no harm."""
    gap = run.mode_gap
    return gap is not None and not _exceeds(
        gap, MAX_EXCESS_CHANGE, MAX_EXCESS_CHANGE_WITH_FLIPS, MAX_FLIPPED_SHARE
    )


def is_known_cause_harmless(run: Run) -> bool:
    """Return whether the mode gap was measured, and is too small for a cause that is certain.

    Until training ends it has to be as large as without a known cause: early gaps close again.
    """
    if not run.is_settled:
        return is_known_harmless(run)
    gap = run.mode_gap
    return gap is not None and not _exceeds(
        gap, HARMFUL_CHANGE, MAX_EXCESS_CHANGE_WITH_FLIPS, HARMFUL_FLIPPED_SHARE
    )


def is_lasting(run: Run) -> bool:
    """Return whether harm that evaluation shows lasts.

    While weights move fast the running statistics lag behind, and catch up as the learning rate
    falls: until training ends, only harm in several evaluations in a row counts.
    """
    if run.is_settled:
        return True
    gaps = (*run.earlier_mode_gaps, *((run.mode_gap,) if run.mode_gap else ()))
    newest = gaps[-LASTING_EVALUATIONS:]
    return len(newest) == LASTING_EVALUATIONS and all(map(is_harmful, newest))


def what_is_left(
    layer: LayerHistory,
    running: RunningStatistics | None,
    weight: float | None,
    max_weight: float,
) -> str | None:
    """Return, in words, what is left of the initial statistics; None if too little.

    A small weight of the initial mean 0 is a large shift if the mean is far from 0. That is judged
    in training only: the statistics of a checkpoint may be a plain average without initial part.
    """
    if running is None or not weight:
        return None
    if weight > max_weight:
        return f"{weight:.0%} of the initial statistics was left"
    shift = largest(initial_shift_std(running.mean, running.var, layer.eps, weight, weight))
    if layer.updates_seen and shift is not None and shift > MAX_INITIAL_SHIFT_STD:
        return f"the initial mean 0 still shifted a channel by {shift:.2g} σ"
    return None


def left_when_evaluated(layer: LayerHistory, max_weight: float) -> str | None:
    """Return, in words, what was left of the initial statistics in the newest evaluation."""
    if layer.evaluated is None:
        return None
    weight = layer.initial_weight_when_evaluated
    return what_is_left(layer, layer.evaluated.running, weight, max_weight)


def evaluated_too_early(history: History, max_weight: float) -> dict[str, str]:
    """Return the layers whose newest evaluation is not judged, by name, with the reason.

    A rest of the initial statistics at one layer affects all layers called after it. If training
    ended like that, they are judged.
    """
    reasons: dict[str, str] = {}
    early: str | None = None
    is_final = False
    for layer in history.layers_in_order:
        early = early or left_when_evaluated(layer, max_weight)
        left = what_is_left(layer, layer.running, layer.initial_weight, max_weight)
        is_final = is_final or (history.run.is_settled and left is not None)
        if early and not is_final:
            reasons[layer.name] = f"when it was evaluated, {early}"
    return reasons


def is_representative(seen: EvalWindow) -> bool:
    """Return whether the batches of an evaluation are alike, so that some represent all."""
    return not seen.between_share > MAX_BETWEEN_SHARE


@dataclass(frozen=True)
class Distance:
    """How far eval moments are from a mean and a variance, per channel, and the limits.

    Attributes:
        shift: |shift| of the mean, in standard deviations.
        ratio: |log-variance ratio|.
        max_shift: Limit of the shift.
        max_ratio: Limit of the ratio.
        quantile: Share of the channels that has to be within the limits.
    """

    shift: FloatArray
    ratio: FloatArray
    max_shift: float
    max_ratio: float
    quantile: float

    @cached_property
    def measured(self) -> tuple[Evidence, Evidence] | None:
        """Shift and ratio at the quantile, each with its limit; None if none is finite."""
        judged = np.isfinite(self.shift) & np.isfinite(self.ratio)
        if not judged.any():
            return None
        values = np.stack([self.shift, self.ratio])[:, judged]
        shift, ratio = np.quantile(values, self.quantile, axis=1).tolist()
        return (
            Evidence("shift of the mean", shift, self.max_shift, "σ"),
            Evidence("variance off by", ratio, self.max_ratio, LOGARITHM),
        )

    @cached_property
    def worst(self) -> Evidence | None:
        """The one that is larger relative to its limit; None if none is finite."""
        return max(self.measured or (), key=lambda found: found.value / found.limit, default=None)

    @property
    def excess(self) -> float:
        """The worst relative to its limit; 0 if nothing is finite."""
        return 0.0 if self.worst is None else self.worst.value / self.worst.limit

    @property
    def is_beyond(self) -> bool:
        """Whether one of the two is beyond its limit."""
        return self.excess > 1.0

    @property
    def channels(self) -> tuple[int, ...]:
        """The channels beyond a limit, the furthest first."""
        excess = np.maximum(self.shift / self.max_shift, self.ratio / self.max_ratio)
        excess = np.where(np.isfinite(excess), excess, 0.0)
        order = np.argsort(-excess, kind="stable")
        return tuple(int(channel) for channel in order if excess[channel] > 1.0)


def is_sampling(seen: EvalWindow, distance: Distance, var: FloatArray, eps: float) -> bool:
    """Return whether a distance may come from the choice of batches that were read.

    It may if the evaluation is sorted and the mean is off by at most twice the spread between its
    batches: the other batches may be as far off on the other side.
    """
    if is_representative(seen) or seen.var_between is None:
        return False
    with np.errstate(all="ignore"):
        spread = np.sqrt(seen.var_between / (var + eps))
    rest = np.maximum(0.0, distance.shift - 2.0 * spread)
    left = dataclasses.replace(distance, shift=rest, ratio=np.zeros_like(distance.ratio))
    return not left.is_beyond


@dataclass(frozen=True)
class DriftLimits:
    """The distance beyond which eval moments have drifted: see :class:`Distance`."""

    max_shift: float
    max_ratio: float
    quantile: float

    def distance(self, seen: EvalWindow, mean: FloatArray, var: FloatArray, eps: float) -> Distance:
        """Return how far the inputs in eval mode are from a mean and a variance."""
        shift, ratio = drift(seen, mean, var, eps)
        return Distance(shift, ratio, self.max_shift, self.max_ratio, self.quantile)


# The limits of BN301.
DRIFT_LIMITS = DriftLimits(max_shift=1.0, max_ratio=1.5, quantile=0.9)


# Share of these limits up to which statistics fit: a mode gap may add up from layers that are each
# within the limits.
FITTING_SHARE = 0.3


def distance_of(layer: LayerHistory) -> Distance | None:
    """Return how far the inputs of the newest evaluation are from the statistics that it used."""
    if layer.evaluated is None:
        return None
    running = layer.evaluated.running
    return DRIFT_LIMITS.distance(layer.evaluated, running.mean, running.var, layer.eps)


def fits(layer: LayerHistory) -> bool:
    """Return whether the inputs of the newest evaluation match the running statistics."""
    if layer.evaluated is None or layer.evaluated.running.bad_channels:
        return False
    distance = distance_of(layer)
    return distance is not None and distance.worst is not None and distance.excess <= FITTING_SHARE


def is_unused(layer: LayerHistory) -> bool:
    """Return whether evaluation was read, and did not call the layer: an expert without samples."""
    was_called = layer.calls.is_in_eval_mode or bool(layer.unseen_calls)
    return layer.run.mode_gap is not None and not was_called


# The network before a layer changes from batch to batch if batch means jump by more than this many
# sampling errors while the data vary by at most this variance ratio (BN203).
_JUMP_FACTOR = 3.0
_MAX_INPUT_RATIO = 2.0


def jump_of_network(layer: LayerHistory) -> float | None:
    """Return how far batch means jump, in σ, if the network causes it and not the data."""
    window, inputs = layer.window, layer.run.inputs
    if window is None or inputs is None or not layer.samples:
        return None
    jump, ratio = (
        float(np.median(values[np.isfinite(values)])) if np.isfinite(values).any() else np.nan
        for values in (window.noise_std, inputs.variance_ratio)
    )
    is_made = jump > _JUMP_FACTOR / math.sqrt(layer.samples) and ratio <= _MAX_INPUT_RATIO
    return jump if is_made else None


def drift(
    seen: EvalWindow, mean: FloatArray, var: FloatArray, eps: float
) -> tuple[FloatArray, FloatArray]:
    """Return |shift| and |log-variance ratio| of eval moments against a mean and a variance."""
    with np.errstate(all="ignore"):
        return (
            np.abs(shift_std(seen.mean, mean, var, eps)),
            np.abs(log_variance_ratio(seen.var_unbiased, var, eps)),
        )
