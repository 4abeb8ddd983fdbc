"""BN301 statistic-drift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Finding, Fix, Severity, Skipped, counted
from bnguard.observe.history import History, LayerHistory
from bnguard.rules.base import ExplainedRule, RootAt
from bnguard.rules.drift_causes import Cause, Drift, cause_in_chain, doubt_of_drift
from bnguard.rules.measurements import (
    DRIFT_LIMITS,
    Distance,
    DriftLimits,
    evaluated_too_early,
    is_known_harmless,
    is_lasting,
)


@dataclass(frozen=True, kw_only=True)
class StatisticDrift(ExplainedRule):
    """Inputs in eval mode do not match the running statistics.

    Why it matters:
        In eval mode the running statistics replace those of the batch. If they are off, every
        channel reaches the next layer shifted and scaled: the usual reason why eval() is far worse
        than train().

    What you see:
        The training loss falls, and validation is bad or jumps. In train mode the same samples are
        predicted well.

    Example:
        Weights that move faster than the average::

            # Fault: momentum 0.001 averages over some 1,000 updates
            layer.momentum = 0.001
            # Fix: new statistics with the weights as they are now
            bnguard.recalibrate(model, train_loader)

    Fix:
        Recalibrate, and remove the cause that the finding names: for sorted or small batches,
        several streams and other data the fix is not recalibration. Recalibration changes only the
        running statistics, is measured, and can be undone; on other data than those of training it
        adapts the network to them.

    What it does not mean:
        A drift is not yet harm at the outputs: that is BN302. It is ``info`` if the mode gap was
        measured and shows no harm, if training called the layer in eval mode too, and, while
        training goes on, until four evaluations in a row show harm, since the average catches up
        when the weights slow down.

    Evidence:
        Shift of the mean in running standard deviations, and logarithm of the variance ratio,
        between the newest evaluation and the running statistics that it used; the quantile over the
        channels.

        A cause that another rule found comes first, with its numbers and its fix (BN303 too few
        updates, BN304 other weights, BN305 other data, BN207 streams, BN203 sorted and BN202 small
        batches). Otherwise the newest batches of training decide. If they match evaluation, the
        average is at fault: it lags behind the weights, or holds too few batches (a shift within
        three times its own uncertainty). If not, the cause is dropout before the layer, noisy small
        batches (also if they let the drift grow from layer to layer), a batch of one sample, other
        data (at the first layer), or something between the layers that differs in eval mode. Later
        layers get the cause of the first that drifted.

        The first batches of an evaluation are read, then each whose number doubles. If more than 15
        % of the variance between samples is between them, they do not represent the rest, and it
        is ``info`` unless the shift is more than twice their spread: evaluations of digits have at
        most 1 %, sorted by class 21 to 70 %. With only a few pairs of batches, which show as much
        by chance, it is ``info`` only if no cause is certain.

    Limits:
        max_shift_std: 1 running standard deviation. The worst layer of 95 % of the healthy runs of
            the zoo stays below 0.52, and what is beyond does no harm at the outputs; statistics
            that lag reach 3.7 to 8.3.
        max_log_variance_ratio: 1.5, a factor of 4.5. 95 % of the healthy runs stay below 0.58,
            noise in training alone gives 2.9.
        channel_quantile: 0.9 of the channels have to be within the limits.
        min_values: 32 values per channel in eval mode before they are judged.
        max_initial_weight: 0.05. An evaluation with more of the initial statistics left, or an
            initial mean that still shifted a channel by 1 σ, is not judged, unless training ended
            like that.

    References:
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3, arXiv:2105.07576.
        Ioffe, "Batch Renormalization" (2017), section 3, arXiv:1702.03275.
        liuzechun/MetaPruning#15, statistics that mix all paths of a supernet.
    """

    code: ClassVar[str] = "BN301"
    name: ClassVar[str] = "statistic-drift"
    explains: ClassVar[tuple[str, ...]] = ("BN302", "BN403")

    max_shift_std: float = DRIFT_LIMITS.max_shift
    max_log_variance_ratio: float = DRIFT_LIMITS.max_ratio
    channel_quantile: float = DRIFT_LIMITS.quantile
    min_values: int = 32
    max_initial_weight: float = 0.05

    def check_because(self, history: History, root_at: RootAt) -> Iterator[Finding | Skipped]:
        """Compare shift and log-variance ratio of the newest evaluation with their limits."""
        drifts: list[Drift] = []
        called, entrance = history.layers_in_order, history.first_trained
        too_early = evaluated_too_early(history, self.max_initial_weight)
        before: LayerHistory | None = None
        for layer in (*called, *(layer for layer in history.layers if layer not in called)):
            judged = self._judge(layer, too_early.get(layer.name))
            if isinstance(judged, Skipped):
                yield judged
            elif judged is not None and layer.evaluated is not None and entrance is not None:
                drifts.append(Drift(layer, layer.evaluated, judged, self._limits, entrance, before))
            before = layer
        for drift in drifts:
            # A drift of a frozen network in front does not reach one that trains next to it.
            alike = [other for other in drifts if other.is_trained == drift.is_trained]
            yield self._describe(drift, alike[0], root_at(drift.layer))

    @property
    def _limits(self) -> DriftLimits:
        return DriftLimits(self.max_shift_std, self.max_log_variance_ratio, self.channel_quantile)

    def _judge(self, layer: LayerHistory, too_early: str | None) -> Distance | Skipped | None:
        """Return how far the layer has drifted, None if within the limits, or why unknown."""
        seen = layer.evaluated
        if seen is None:
            return self.skip(layer, "the layer was not seen in eval mode")
        if seen.count < self.min_values:
            return self.skip(
                layer, f"only {counted(seen.count, 'value')} per channel observed in eval mode"
            )
        if too_early is not None:
            return self.skip(layer, too_early)
        distance = self._limits.distance(seen, seen.running.mean, seen.running.var, layer.eps)
        if distance.worst is None:
            return self.skip(layer, "no channel has finite statistics")
        return distance if distance.is_beyond else None

    def _describe(self, drift: Drift, first: Drift, found: Finding | None) -> Finding:
        doubt = doubt_of_drift(drift, found)
        cause = doubt or (Cause.of(found) if found is not None else cause_in_chain(drift, first))
        evidence = drift.distance.worst
        assert evidence is not None
        message = "inputs in eval mode do not match the running statistics"
        return self.make_finding(
            drift.layer,
            Severity.INFO if doubt is not None else _severity(drift.layer),
            message if cause is None else f"{message}, {cause.reason}",
            evidence,
            _FIX if cause is None else cause.fix,
            reasons=() if cause is None else cause.evidence,
            channels=drift.distance.channels,
            step=drift.seen.step,
        )


_FIX = Fix("recalibrate the running statistics with the current weights", "recalibrate")


def _severity(layer: LayerHistory) -> Severity:
    is_held = layer.evaluated is not None and layer.evaluated.is_held
    is_choice = is_held or (layer.run.steps > 0 and not layer.updates_seen and not layer.training)
    if is_choice or is_known_harmless(layer.run) or not is_lasting(layer.run):
        return Severity.INFO
    return Severity.WARNING
