"""What several rules measure: drift of the eval moments, and whether the mode gap does harm."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bnguard.findings import Evidence
from bnguard.history import EvalWindow, ModeGap, Run
from bnguard.stats import FloatArray, log_variance_ratio, shift_std

# Beyond what sampling explains, the two modes are different networks where the outputs change this
# much, or half as much where predictions flip. See BN302 for the figures.
MAX_EXCESS_CHANGE = 0.75
MAX_EXCESS_CHANGE_WITH_FLIPS = 0.3
MAX_FLIPPED_SHARE = 0.12
SAMPLING_FACTOR = 2.0

# Evaluations in a row that show harm before it counts while training goes on.
LASTING_EVALUATIONS = 4


def excess_change(gap: ModeGap) -> float:
    """Return the change of the outputs between the modes that sampling does not explain."""
    sampling = SAMPLING_FACTOR * (gap.sampling_change or 0.0)
    if not np.isfinite(sampling):
        return gap.relative_change
    return float(np.sqrt(max(0.0, gap.relative_change**2 - sampling**2)))


def is_harmful(
    gap: ModeGap,
    *,
    max_change: float = MAX_EXCESS_CHANGE,
    max_change_with_flips: float = MAX_EXCESS_CHANGE_WITH_FLIPS,
    max_flipped_share: float = MAX_FLIPPED_SHARE,
) -> bool:
    """Return whether the two modes give different answers for the same batch."""
    excess = excess_change(gap)
    has_flips = gap.flipped_share is not None and gap.flipped_share > max_flipped_share
    return excess > max_change or (has_flips and excess > max_change_with_flips)


def is_known_harmless(run: Run) -> bool:
    """Return whether the mode gap was measured, and shows no harm."""
    return run.mode_gap is not None and not is_harmful(run.mode_gap)


def is_lasting(run: Run) -> bool:
    """Return whether what evaluation shows now is here to stay.

    While weights move fast the running statistics lag behind, which passes as the learning rate
    falls: until training ends, only what several evaluations in a row have shown counts.
    """
    if run.is_settled:
        return True
    gaps = (*run.earlier_mode_gaps, *((run.mode_gap,) if run.mode_gap else ()))
    newest = gaps[-LASTING_EVALUATIONS:]
    return len(newest) == LASTING_EVALUATIONS and all(map(is_harmful, newest))


def drift(
    seen: EvalWindow, mean: FloatArray, var: FloatArray, eps: float
) -> tuple[FloatArray, FloatArray]:
    """Return |shift| and |log-variance ratio| of eval moments against a mean and a variance."""
    with np.errstate(all="ignore"):
        return (
            np.abs(shift_std(seen.mean, mean, var, eps)),
            np.abs(log_variance_ratio(seen.var_unbiased, var, eps)),
        )


def worst_evidence(
    shift: FloatArray,
    ratio: FloatArray,
    judged: npt.NDArray[np.bool_],
    *,
    max_shift_std: float,
    max_log_variance_ratio: float,
    channel_quantile: float,
) -> Evidence:
    """Return the one of two distances that lies furthest beyond its limit."""
    return max(
        Evidence(
            "shift of the mean",
            float(np.quantile(shift[judged], channel_quantile)),
            max_shift_std,
            "σ",
        ),
        Evidence(
            "|log variance ratio|",
            float(np.quantile(ratio[judged], channel_quantile)),
            max_log_variance_ratio,
        ),
        key=lambda evidence: evidence.value / evidence.limit,
    )
