"""BN302 mode-gap."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped, counted
from bnguard.observe.history import History, ModeGap
from bnguard.rules.base import ExplainedRule, RootAt
from bnguard.rules.drift_causes import Cause, cause_of_gap, doubt_of_gap
from bnguard.rules.measurements import (
    MAX_EXCESS_CHANGE,
    MAX_EXCESS_CHANGE_WITH_FLIPS,
    MAX_FLIPPED_SHARE,
    excess_change,
    is_harmful,
    is_known,
    is_lasting,
    left_when_evaluated,
)


@dataclass(frozen=True, kw_only=True)
class ModesDisagree(ExplainedRule):
    """The two modes give different answers for the same batch.

    Why it matters:
        Only BN differs between the two runs, so that the whole gap is its doing: what was trained
        is not what is evaluated. This is harm measured at the output, where a distribution test
        at a layer (BN301) only suspects it. The cause, where a rule found one, comes first.

    Evidence:
        Rows of the first four batches of the newest evaluation, or of as many as hold 32 samples,
        run together twice, with running and with batch statistics, everything else in eval mode, as
        are layers that training called in eval mode too. Two numbers count. The root mean square
        change of the outputs, in their standard deviations, without the part that sampling explains
        (twice the change between the statistics of every second row and of all). And, for class
        scores, the share of predictions that flip; if many do, a smaller change is harm already. A
        flip counts if one of the modes finds the two classes more than 0.05 of probability apart.

        Fewer samples, or rows that are not independent samples (nodes of graphs, packed
        sequences), are not judged, since the part of sampling is unknown. It is ``info`` if no
        layer was trained; while training goes on, until four evaluations in a row show it, or if
        few predictions flip; and if the evaluation is sorted (BN301) and no drift was found. The
        cause is that of the layer that fits worst.

    Limits:
        max_excess_change: 0.75 standard deviations of the outputs. 95 % of the healthy runs of the
            zoo stay below 0.21; beyond 0.75 are only those frozen on other data (``info``). Faults
            reach 0.6 to 1.2.
        max_excess_change_with_flips: 0.3, where more predictions flip than the next limit says.
        max_flipped_share: 0.12 of the predictions. Healthy runs stay below 0.11.
        max_initial_weight: 0.05. An evaluation that ran while more of the initial statistics was
            left, or the initial mean still shifted a channel by 1 σ, is not judged, unless training
            ended like that.

    Fix:
        Mend the cause that the finding names; where it is in the average, recalibrate, which says
        by how much it helps::

            bnguard.recalibrate(model, train_loader)

    Fix safety:
        Recalibration changes the running statistics only, is measured, and can be undone.

    References:
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 4: inconsistency between
            training and testing.
        PyTorch issue 4741, "Using model.eval() with batchnorm gives high error".
    """

    code: ClassVar[str] = "BN302"
    name: ClassVar[str] = "mode-gap"

    max_excess_change: float = MAX_EXCESS_CHANGE
    max_excess_change_with_flips: float = MAX_EXCESS_CHANGE_WITH_FLIPS
    max_flipped_share: float = MAX_FLIPPED_SHARE
    max_initial_weight: float = 0.05

    def check_because(self, history: History, root_at: RootAt) -> Iterator[Finding | Skipped]:
        """Hold the gap between the modes against both limits."""
        run = history.run
        gap = run.mode_gap
        if gap is None:
            yield self._skipped(None, run.mode_gap_reason)
            return
        # Sampling does not make outputs NaN or infinite.
        if not is_known(gap) and math.isfinite(gap.relative_change):
            yield self._skipped(None, _why_unknown(gap))
            return
        reasons = (left_when_evaluated(layer, self.max_initial_weight) for layer in history.layers)
        left = next(filter(None, reasons), None)
        if left and not run.is_settled:
            yield self._skipped(None, f"when it was evaluated, {left}")
        elif is_harmful(
            gap,
            max_change=self.max_excess_change,
            max_change_with_flips=self.max_excess_change_with_flips,
            max_flipped_share=self.max_flipped_share,
        ):
            yield self._found(history, gap, root_at(None))

    def _found(self, history: History, gap: ModeGap, found: Finding | None) -> Finding:
        is_trained = any(layer.updates_seen or layer.training for layer in history.layers)
        # Where it is a drift alone (BN301), what speaks for its cause speaks for this one.
        cause = cause_of_gap(history) if found is None or found.reasons else Cause.of(found)
        # A drift that was found does not depend on which batches were looked at.
        doubt = doubt_of_gap(history, cause) if found is None else None
        cause = doubt or cause
        excess = excess_change(gap)
        is_large = excess > self.max_excess_change
        limit = self.max_excess_change if is_large else self.max_excess_change_with_flips
        message = "running and batch statistics give different outputs for the same batch"
        if gap.flipped_share is not None:
            message += f", and {gap.flipped_share:.0%} of its predictions flip"
        # While weights move fast outputs change, and the predictions are the same.
        is_shown = (
            history.run.is_settled
            or gap.flipped_share is None
            or not is_large
            or (gap.flipped_share > self.max_flipped_share)
        )
        is_sure = is_trained and doubt is None and is_lasting(history.run) and is_shown
        return self._finding(
            None,
            Severity.WARNING if is_sure else Severity.INFO,
            message if cause is None else f"{message}, {cause.reason}",
            Evidence("change of the outputs", excess, limit, "σ"),
            _FIX if cause is None else cause.fix,
            reasons=() if cause is None else cause.evidence,
        )


def _why_unknown(gap: ModeGap) -> str:
    change = f"the modes differ by {gap.relative_change:.3g} σ"
    if not gap.samples:
        return (
            f"{change}, and the rows of the inputs are not independent samples (as in graphs or "
            "packed sequences), so the part that sampling explains is unknown"
        )
    return (
        f"{change} on {counted(gap.samples, 'sample')} of evaluation, too few to tell the part "
        "that sampling explains"
    )


_FIX = Fix("recalibrate, which says by how much it helps", "recalibrate")
