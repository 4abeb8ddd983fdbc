"""BN301 statistic-drift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.history import EvalWindow, LayerHistory
from bnguard.rules.base import Rule
from bnguard.rules.measures import drift, is_known_harmless, is_lasting, worst_evidence
from bnguard.stats import FloatArray


@dataclass(frozen=True, kw_only=True)
class StatisticDrift(Rule):
    """Running statistics do not describe what arrives in eval mode.

    Why it matters:
        In eval mode the running statistics stand in for those of the batch. Where they are off,
        every channel reaches the next layer shifted and scaled, and the network's accuracy falls
        although training looks well: the usual cause of "eval() is far worse than train()".

    Evidence:
        The eval moments of the newest evaluation against the running statistics that were used in
        it: the shift in running standard deviations, and the logarithm of the variance ratio. The
        layer's number is the quantile over its channels, so that a few odd channels do not speak
        for all. A distribution test alone is at most a ``warning``, and ``info`` where the mode
        gap was measured and shows no harm, where the layer was frozen throughout training, and
        while training goes on and fewer than four evaluations in a row have shown harm: fast
        weights leave the average behind, and let it catch up later.
        A cause that another rule has measured stands before it (BN303 too few updates, BN305
        other data, BN304 other weights, BN207 streams, BN203 sorted and BN202 small batches).
        Otherwise the newest batches of training tell: where they agree with evaluation, the
        running average lags behind the weights; where they do not, what arrives is different.

    Limits:
        max_shift_std: Shift of the mean, in running standard deviations: 1. The worst layer of 95 %
            of the healthy runs of the zoo stays below 0.52, and what lies beyond does no harm at
            the outputs; the faults reach 2.0 to 7.5.
        max_log_variance_ratio: |log(variance / running variance)|; 1.5 is a factor of 4.5.
        channel_quantile: Share of the channels that has to be within the limits.
        min_values: Values per channel observed in eval mode before they are judged.
        max_initial_weight: An evaluation that ran while more of the initial statistics than this
            was left is not judged, unless training ended like that.

    Fix:
        Estimate the statistics again with the weights as they are now::

            bnguard.recalibrate(model, train_loader)

        and mend the cause: too small a ``momentum`` for the number of steps (BN303), small
        batches (BN201), or data that differ between training and evaluation (BN305).

    Fix safety:
        Recalibration changes the running statistics only, is measured, and can be undone. On
        data that differ from those of training it adapts the network to them, which may or may
        not be wanted.

    References:
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3: PreciseBN.
        Ioffe, "Batch Renormalization" (2017), section 3, on moments that disagree.
    """

    code: ClassVar[str] = "BN301"
    name: ClassVar[str] = "statistic-drift"
    explains: ClassVar[tuple[str, ...]] = ("BN302",)

    max_shift_std: float = 1.0
    max_log_variance_ratio: float = 1.5
    channel_quantile: float = 0.9
    min_values: int = 32
    max_initial_weight: float = 0.05

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Hold shift and log-variance ratio of the newest evaluation against their limits."""
        seen = layer.evaluated
        if seen is None:
            yield self._skipped(layer, "the layer was not seen in eval mode")
            return
        if seen.count < self.min_values:
            yield self._skipped(layer, f"{seen.count} values per channel in eval mode are too few")
            return
        left, left_then = layer.initial_weight or 0.0, layer.initial_weight_when_evaluated or 0.0
        is_final = layer.run.is_settled and left > self.max_initial_weight
        if left_then > self.max_initial_weight and not is_final:
            yield self._skipped(
                layer, f"when it was evaluated, {left_then:.0%} of the initial statistics was left"
            )
            return
        shift, ratio = drift(seen, seen.running.mean, seen.running.var, layer.eps)
        worst = self._worst(shift, ratio)
        if worst is None:
            yield self._skipped(layer, "no channel has finite statistics")
            return
        if worst.value <= worst.limit:
            return
        yield self._finding(
            layer,
            self._severity(layer),
            "what arrives in eval mode is not what the running statistics say"
            + self._reason(layer, seen, left if is_final else 0.0),
            worst,
            Fix("recalibrate the running statistics with the weights as they are", "recalibrate"),
            channels=self._drifted_channels(shift, ratio),
            step=seen.step,
        )

    def _severity(self, layer: LayerHistory) -> Severity:
        is_choice = layer.run.steps > 0 and not layer.updates_seen and not layer.training
        if is_choice or is_known_harmless(layer.run) or not is_lasting(layer.run):
            return Severity.INFO
        return Severity.WARNING

    def _worst(self, shift: FloatArray, ratio: FloatArray) -> Evidence | None:
        judged = np.isfinite(shift) & np.isfinite(ratio)
        if not judged.any():
            return None
        return worst_evidence(
            shift,
            ratio,
            judged,
            max_shift_std=self.max_shift_std,
            max_log_variance_ratio=self.max_log_variance_ratio,
            channel_quantile=self.channel_quantile,
        )

    def _reason(self, layer: LayerHistory, seen: EvalWindow, initial_weight: float) -> str:
        """Return what the newest batches of training say about the cause, as part of a sentence."""
        if initial_weight:
            return f": {initial_weight:.0%} of them is still the initial value (BN303)"
        if layer.window is None:
            return ""
        with_batches = self._worst(
            *drift(seen, layer.window.mean, layer.window.var_unbiased, layer.eps)
        )
        if with_batches is None:
            return ""
        numbers = f"{with_batches.measure} against them {with_batches.value:.2g}"
        if with_batches.value <= with_batches.limit:
            return f": they lag behind the newest batches, which agree with it ({numbers})"
        return f", nor what the newest batches of training were ({numbers})"

    def _drifted_channels(self, shift: FloatArray, ratio: FloatArray) -> tuple[int, ...]:
        excess = np.maximum(shift / self.max_shift_std, ratio / self.max_log_variance_ratio)
        excess = np.where(np.isfinite(excess), excess, 0.0)
        order = np.argsort(-excess, kind="stable")
        return tuple(int(channel) for channel in order if excess[channel] > 1.0)
