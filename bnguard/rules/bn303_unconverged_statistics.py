"""BN303 unconverged-statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped, counted
from bnguard.layers.distances import initial_shift_std, initial_weight, updates_to_forget
from bnguard.observe.history import History, LayerHistory
from bnguard.rules.base import ModelRule
from bnguard.rules.measurements import MAX_INITIAL_SHIFT_STD, fits, is_unused


@dataclass(frozen=True, kw_only=True)
class UnconvergedStatistics(ModelRule):
    """The running statistics still contain a part of the initial mean 0 and variance 1.

    Why it matters:
        Running statistics begin at mean 0 and variance 1 and forget them at the rate of
        ``momentum``. After too few updates they do not describe the data: training, which uses
        batch statistics, is fine, and evaluation is far worse.

    What you see:
        In a short run, or with momentum 0.01 or less, validation is at chance first and then
        improves without a change in the training loss.

    Example:
        Ten updates with a small momentum::

            # Fault: (1 - 0.01)^10 = 90 % of mean 0 and variance 1 are left
            layer = torch.nn.BatchNorm2d(channels, momentum=0.01)
            # Fix: a plain average, or new statistics for a trained network
            layer = torch.nn.BatchNorm2d(channels, momentum=None)
            bnguard.recalibrate(model, train_loader)

    Fix:
        Recalibrate, which takes one pass over some 1,000 samples, changes only the running
        statistics, and can be undone. For the next run: a larger momentum, or ``momentum=None``;
        and input columns with mean 0 and standard deviation 1.

    What it does not mean:
        A low counter alone is not a fault: ``update_bn`` resets it and computes a plain average (a
        variance below the weight left, which an average that began at 1 cannot have, reveals that),
        and statistics that evaluation showed to fit are not judged. A layer without any update is
        ``info``, unless a checkpoint counts training steps; so is one that evaluation does not
        call, as an expert that gets no sample.

    Evidence:
        The weight of the initial statistics, (1 - momentum)^updates, from ``num_batches_tracked``;
        while training goes on and its length is known, the weight left at its end. A checkpoint
        does not hold ``momentum`` unless ``BatchNormMonitor`` saved it; 0.1 is assumed, and the
        message says so if that decides.

        In training that is watched, also how far the initial mean 0 shifts a running mean: raw
        columns of a table (a year, a price) are hundreds of standard deviations from 0, so 1 % of
        it is far too much.

    Limits:
        max_initial_weight: 0.05, which momentum 0.1 reaches after 29 updates, 0.01 after 299. Means
            and variances off by 5 % do no harm that can be measured on the networks of the tests.
        max_initial_shift_std: 1 running standard deviation in any channel, BN301's limit.

    References:
        Ioffe & Szegedy, "Batch Normalization" (2015), section 3.1, arXiv:1502.03167.
        torch.nn.BatchNorm2d, on ``momentum`` and ``num_batches_tracked``.
        tensorflow/tensorflow#46414, 12 epochs of 4 steps; tensorflow/tensorflow#1122, too few
            iterations.
    """

    code: ClassVar[str] = "BN303"
    name: ClassVar[str] = "unconverged-statistics"
    is_static: ClassVar[bool] = True
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302", "BN403")
    acts_by_statistics: ClassVar[bool] = True
    is_local: ClassVar[bool] = True

    max_initial_weight: float = 0.05
    max_initial_shift_std: float = MAX_INITIAL_SHIFT_STD

    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Compare the weight of the initial statistics, now or at the end, with the limit."""
        if any(map(_is_estimated_otherwise, history.layers)):
            yield self.skip(
                None,
                "a variance is smaller than what would be left of the initial variance 1, so the "
                "statistics were computed in another way",
            )
            return
        is_untrained = not any(layer.is_counted for layer in history.layers)
        for layer in history.layers:
            if layer.is_untrained:
                yield self._never_updated(layer, is_untrained=is_untrained)
            else:
                yield from self._judge(layer)

    def _never_updated(self, layer: LayerHistory, *, is_untrained: bool) -> Finding:
        """Return the finding for initial statistics without a counted update."""
        severity, steps = Severity.INFO, layer.run.stored_steps
        if is_untrained and steps:
            severity = Severity.WARNING
            message = f"{counted(steps, 'training step')}, but no update of the running statistics"
            fix = Fix("train with these layers in train mode, or recalibrate", "recalibrate")
        elif is_untrained:
            message = "no update yet, as in a network that was not trained"
            fix = Fix("train first; recalibrate if the weights are already trained", "recalibrate")
        else:
            message = "no update, but other layers were updated"
            fix = Fix("recalibrate if evaluation calls the layer", "recalibrate")
        return self.make_finding(
            layer,
            severity,
            f"{message}: eval mode uses the initial mean 0 and variance 1",
            Evidence("initial statistics left", 100.0, 100 * self.max_initial_weight, "%"),
            fix,
        )

    def _judge(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        if layer.running is None:
            yield self.skip(layer, "the layer keeps no running statistics")
            return
        if layer.run.steps and not layer.updates_seen and layer.position is None:
            yield self.skip(layer, "the layer was never called")
            return
        was_called = layer.calls.in_training or layer.updates_seen
        if layer.running.is_initial and layer.calls.is_in_eval_mode and not was_called:
            yield self.skip(layer, "the layer was frozen (BN209 and BN304 judge that)")
            return
        if not layer.is_updating and not layer.updates_seen:
            yield self.skip(layer, "the layer never updates its statistics")
            return
        if layer.calls.are_of_meta_learner:
            yield self.skip(layer, "adapted weights were never run in eval mode")
            return
        if layer.is_recalibrated:
            yield self.skip(layer, "the statistics were recalibrated")
            return
        if _are_shown_to_fit(layer):
            yield self.skip(layer, "the statistics match the inputs of the newest evaluation")
            return
        if _is_written_otherwise(layer):
            yield self.skip(layer, "the statistics change without counted updates")
            return
        left, updates = layer.initial_weight, layer.running.updates
        when, verb = "", "are still"
        if updates is None or left is None:
            yield self.skip(layer, "no counter of updates")
            return
        if not layer.run.is_settled:
            planned = _updates_at_end(layer, updates)
            if planned is None:
                yield self.skip(layer, "training goes on, and its length is unknown")
                return
            left, updates = initial_weight(layer.momentum, planned), planned
            when, verb = "when training ends, ", "will still be"
        if left <= self.max_initial_weight:
            yield from self._judge_shift(layer, left, updates, f"{when}only", verb)
            return
        needed = updates_to_forget(layer.momentum, self.max_initial_weight)
        assumed = "" if layer.is_momentum_known else " (momentum 0.1 assumed)"
        yield self.make_finding(
            layer,
            Severity.INFO if is_unused(layer) else Severity.WARNING,
            f"{when}{left:.0%} of the running statistics {verb} the initial mean 0 and variance 1: "
            f"{counted(updates, 'update')}, {_describe_needed(needed)}{assumed}",
            Evidence("initial statistics left", 100 * left, 100 * self.max_initial_weight, "%"),
            Fix("recalibrate the running statistics, or raise momentum", "recalibrate"),
        )

    def _judge_shift(
        self, layer: LayerHistory, left: float, updates: int, only: str, verb: str
    ) -> Iterator[Finding]:
        """Compare the shift by the rest of the initial mean 0 with its limit."""
        running, now = layer.running, layer.initial_weight
        if running is None or not (now and left and layer.updates_seen):
            return
        shift = initial_shift_std(running.mean, running.var, layer.eps, now, left)
        shift = np.where(np.isfinite(shift), shift, 0.0)
        worst = float(np.max(shift, initial=0.0))
        if worst <= self.max_initial_shift_std:
            return
        needed = updates_to_forget(layer.momentum, left * self.max_initial_shift_std / worst)
        yield self.make_finding(
            layer,
            Severity.WARNING,
            f"{only} {100 * left:.2g}% of the running statistics {verb} the initial mean 0 and "
            "variance 1, but the batch means are so far from 0 that this shifts the running mean: "
            f"{counted(updates, 'update')}, {_describe_needed(needed)}",
            Evidence("shift by the initial mean", worst, self.max_initial_shift_std, "σ"),
            Fix(
                "scale the input to mean 0 and standard deviation 1, or train longer; recalibrate "
                "a trained network",
                "recalibrate",
            ),
            channels=tuple(map(int, np.flatnonzero(shift > self.max_initial_shift_std))),
        )


def _describe_needed(updates: float) -> str:
    return "and more do not change that" if math.isinf(updates) else f"{updates:,.0f} needed"


def _updates_at_end(layer: LayerHistory, updates: int) -> int | None:
    run = layer.run
    if run.planned_steps is None or run.steps == 0:
        return None
    updates_per_step = layer.updates_seen / run.steps
    if updates_per_step >= 1.0:
        # More batches of this step may follow.
        updates_per_step = max(updates_per_step, run.plan.accumulated_batches)
    return updates + round(max(0, run.planned_steps - run.steps) * updates_per_step)


def _is_written_otherwise(layer: LayerHistory) -> bool:
    """Return whether the statistics change without the layer, as in an average of weights."""
    start, now = layer.running_at_start, layer.running
    if (
        start is None
        or now is None
        or layer.calls.in_training
        or start.mean.shape != now.mean.shape
    ):
        return False
    return 2 * layer.updates_seen < layer.run.steps and not np.array_equal(start.mean, now.mean)


def _are_shown_to_fit(layer: LayerHistory) -> bool:
    """Return whether evaluation has shown that the current statistics fit."""
    seen, now = layer.evaluated, layer.running
    if seen is None or now is None or seen.count < _FEWEST_VALUES:
        return False
    same = np.array_equal(seen.running.mean, now.mean) and seen.running.updates == now.updates
    return same and fits(layer)


# Values per channel in eval mode before they are judged, as in BN301.
_FEWEST_VALUES = 32


def _is_estimated_otherwise(layer: LayerHistory) -> bool:
    """Return whether a variance is too small for what would be left of the initial 1."""
    if layer.running is None or layer.initial_weight is None:
        return False
    finite = layer.running.var[np.isfinite(layer.running.var)]
    return bool(finite.size and np.min(finite) < _ROUNDING * layer.initial_weight)


# An average in float32 that began at 1 is not smaller than its weight by more than this.
_ROUNDING = 0.999
