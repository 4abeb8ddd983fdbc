"""BN301 statistic-drift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.history import LayerHistory
from bnguard.rules.base import Rule
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
        for all. A distribution test alone is at most a ``warning``.

    Limits:
        max_shift_std: Shift of the mean, in running standard deviations.
        max_log_variance_ratio: |log(variance / running variance)|; 1.5 is a factor of 4.5.
        channel_quantile: Share of the channels that has to be within the limits.
        min_values: Values per channel observed in eval mode before they are judged.
        max_initial_weight: An evaluation that ran while more of the initial statistics than this
            was left is not judged, unless training ended like that.

    Fix:
        Estimate the statistics again with the weights as they are now::

            bnguard.recalibrate(model, train_loader)

        and look for the cause: too small a ``momentum`` for the number of steps (BN303), small
        batches (BN201), or data that differ between training and evaluation.

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

    max_shift_std: float = 1.0
    max_log_variance_ratio: float = 1.5
    channel_quantile: float = 0.9
    min_values: int = 32
    max_initial_weight: float = 0.05

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Hold shift and log-variance ratio of the newest evaluation against their limits."""
        shift, ratio = layer.eval_shift_std, layer.eval_log_variance_ratio
        if layer.evaluated is None or shift is None or ratio is None:
            yield self._skipped(layer, "the layer was not seen in eval mode")
            return
        if layer.evaluated.count < self.min_values:
            yield self._skipped(
                layer, f"{layer.evaluated.count} values per channel in eval mode are too few"
            )
            return
        left, left_then = layer.initial_weight or 0.0, layer.initial_weight_when_evaluated or 0.0
        is_final = layer.run.is_settled and left > self.max_initial_weight
        if left_then > self.max_initial_weight and not is_final:
            yield self._skipped(
                layer, f"when it was evaluated, {left_then:.0%} of the initial statistics was left"
            )
            return
        judged = np.isfinite(shift) & np.isfinite(ratio)
        if not judged.any():
            yield self._skipped(layer, "no channel has finite statistics")
            return
        by_shift = self._evidence("shift of the mean", np.abs(shift), judged, self.max_shift_std)
        by_ratio = self._evidence(
            "|log variance ratio|", np.abs(ratio), judged, self.max_log_variance_ratio
        )
        worst = max(by_shift, by_ratio, key=lambda evidence: evidence.value / evidence.limit)
        if worst.value <= worst.limit:
            return
        yield self._finding(
            layer,
            Severity.WARNING,
            "what arrives in eval mode is not what the running statistics say"
            + (f": {left:.0%} of them is still the initial value (BN303)" if is_final else ""),
            worst,
            Fix("recalibrate the running statistics with the weights as they are", "recalibrate"),
            channels=self._drifted_channels(shift, ratio),
            step=layer.evaluated.step,
        )

    def _evidence(
        self, measure: str, distance: FloatArray, judged: np.ndarray, limit: float
    ) -> Evidence:
        value = float(np.quantile(distance[judged], self.channel_quantile))
        return Evidence(measure, value, limit, "σ" if limit is self.max_shift_std else "")

    def _drifted_channels(self, shift: FloatArray, ratio: FloatArray) -> tuple[int, ...]:
        excess = np.maximum(
            np.abs(shift) / self.max_shift_std, np.abs(ratio) / self.max_log_variance_ratio
        )
        excess = np.where(np.isfinite(excess), excess, 0.0)
        order = np.argsort(-excess, kind="stable")
        return tuple(int(channel) for channel in order if excess[channel] > 1.0)
