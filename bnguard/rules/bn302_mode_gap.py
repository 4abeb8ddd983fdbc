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
    HARMFUL_CHANGE,
    HARMFUL_FLIPPED_SHARE,
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
    """Running and batch statistics give different answers for the same batch.

    Why it matters:
        Only BN differs between the two runs, so BN makes the whole gap: the network that was
        trained is not the one that is evaluated. This is harm measured at the output, where a drift
        at a layer (BN301) only suspects it.

    What you see:
        The training loss is good, validation is not, and in train mode the same validation samples
        are predicted well.

    Example:
        One batch, two answers::

            # Fault
            trained = model.train()(batch)
            evaluated = model.eval()(batch)
            # Fix, if the cause is in the running statistics
            bnguard.recalibrate(model, train_loader)

    Fix:
        Remove the cause that the finding names. If it is in the running statistics, recalibrate,
        which measures how much it helps, changes nothing else, and can be undone.

    What it does not mean:
        No gap does not mean that all is well: with sorted batches both modes agree. It is ``info``
        if no layer was trained; while training goes on, until four evaluations in a row show it, or
        if few predictions flip; if the evaluation is sorted (BN301) and no drift was found; and if
        no drift was found and both modes agree on training batches, so that the running statistics
        are right and the data differ: classes that are balanced in training alone change the
        outputs too, and batch statistics may be the worse ones.

    Evidence:
        Rows of the first four batches of the newest evaluation, or of as many as hold 32 samples,
        run together twice, with running and with batch statistics; everything else is in eval mode,
        as are layers that training called in eval mode too. Two numbers count: the root mean square
        change of the outputs, in their standard deviations, minus what sampling explains (twice the
        change between the statistics of half of the rows and of all); and, for class scores, the
        share of predictions that flip. A flip counts if one mode finds the two classes more than
        0.05 of probability apart. If many flip, a smaller change is harm already.

        A large gap is also measured on rows of the first training batches after the evaluation
        before. Fewer samples, or rows that are not independent samples (nodes of graphs, packed
        sequences), are not judged, since the part of sampling is unknown. The cause is that of the
        layer that fits worst.

    Limits:
        max_excess_change: 0.75 standard deviations of the outputs. 95 % of the healthy runs of the
            zoo stay below 0.23, all below 0.5; faults reach 0.46 to 1.2.
        max_excess_change_with_flips: 0.3, if more predictions flip than the next limit allows.
        max_flipped_share: 0.12 of the predictions. 95 % of the healthy runs stay below 0.07; in
            those where more than 0.12 flip, the outputs change by less than 0.3.
        max_excess_change_if_explained: 0.4, if another rule found a cause and training has ended.
        max_flipped_share_if_explained: 0.07. In 184 of 252 small networks recalibration gained less
            than 1 % accuracy; it changed the outputs of these by up to 0.36 σ and 6.5 % of the
            predictions.
        max_initial_weight: 0.05. An evaluation with more of the initial statistics left, or an
            initial mean that still shifted a channel by 1 σ, is not judged, unless training ended
            like that.

    References:
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 4, arXiv:2105.07576.
        pytorch/pytorch#4741, "Using model.eval() with batchnorm gives high error".
    """

    code: ClassVar[str] = "BN302"
    name: ClassVar[str] = "mode-gap"

    max_excess_change: float = MAX_EXCESS_CHANGE
    max_excess_change_with_flips: float = MAX_EXCESS_CHANGE_WITH_FLIPS
    max_flipped_share: float = MAX_FLIPPED_SHARE
    max_excess_change_if_explained: float = HARMFUL_CHANGE
    max_flipped_share_if_explained: float = HARMFUL_FLIPPED_SHARE
    max_initial_weight: float = 0.05

    def check_because(self, history: History, root_at: RootAt) -> Iterator[Finding | Skipped]:
        """Compare the gap between the modes with both limits."""
        run = history.run
        gap = run.mode_gap
        if gap is None:
            yield self.skip(None, run.mode_gap_reason)
            return
        # Sampling does not make outputs NaN or infinite.
        if not is_known(gap) and math.isfinite(gap.relative_change):
            yield self.skip(None, _why_unknown(gap))
            return
        reasons = (left_when_evaluated(layer, self.max_initial_weight) for layer in history.layers)
        left = next(filter(None, reasons), None)
        if left and not run.is_settled:
            yield self.skip(None, f"when it was evaluated, {left}")
            return
        found = root_at(None)
        is_explained = found is not None and run.is_settled
        max_change, max_flipped_share = (
            (self.max_excess_change_if_explained, self.max_flipped_share_if_explained)
            if is_explained
            else (self.max_excess_change, self.max_flipped_share)
        )
        if is_harmful(
            gap,
            max_change=max_change,
            max_change_with_flips=self.max_excess_change_with_flips,
            max_flipped_share=max_flipped_share,
        ):
            yield self._describe(history, gap, found, max_change)

    def _describe(
        self, history: History, gap: ModeGap, found: Finding | None, max_change: float
    ) -> Finding:
        is_trained = any(layer.updates_seen or layer.training for layer in history.layers)
        # If only a drift (BN301) was found, its cause is the cause of the gap.
        cause = cause_of_gap(history) if found is None or found.reasons else Cause.of(found)
        # A drift that was found does not depend on which batches were read.
        doubt = _other_data(history) or doubt_of_gap(history, cause) if found is None else None
        cause = doubt or cause
        excess = excess_change(gap)
        is_large = excess > max_change
        limit = max_change if is_large else self.max_excess_change_with_flips
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
        return self.make_finding(
            None,
            Severity.WARNING if is_sure else Severity.INFO,
            message if cause is None else f"{message}, {cause.reason}",
            Evidence("change of the outputs", excess, limit, "σ"),
            _FIX if cause is None else cause.fix,
            reasons=() if cause is None else cause.evidence,
        )


def _other_data(history: History) -> Cause | None:
    """Return the cause if the modes agree on training data, with the weights of the evaluation."""
    gap = history.run.mode_gap_in_training
    if (
        gap is None
        or not is_known(gap)
        or is_harmful(gap, max_change=HARMFUL_CHANGE, max_flipped_share=HARMFUL_FLIPPED_SHARE)
    ):
        return None
    agreement = Evidence("change on training batches", excess_change(gap), HARMFUL_CHANGE, "σ")
    return Cause(
        "because evaluation data differ from training data, in preprocessing or in how frequent "
        "classes are: the modes agree on training batches",
        Fix("compare preprocessing and classes: the statistics are right for training data"),
        (agreement,),
    )


def _why_unknown(gap: ModeGap) -> str:
    change = f"the modes differ by {gap.relative_change:.3g} σ"
    if not gap.samples:
        return (
            f"{change}, but how much of it sampling explains is unknown: the rows of the inputs "
            "are not independent samples (graphs, packed sequences)"
        )
    return (
        f"{change} on {counted(gap.samples, 'sample')} of evaluation, too few to know how much of "
        "it sampling explains"
    )


_FIX = Fix("recalibrate, which measures how much it helps", "recalibrate")
