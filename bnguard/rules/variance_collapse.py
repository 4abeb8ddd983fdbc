"""BN201 variance-collapse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import BatchWindow, LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class VarianceCollapse(Rule):
    """The batches are so small or so uniform that normalising them erases the signal.

    Why it matters:
        BN keeps what distinguishes the values of one batch and removes what they share. With two
        values per channel every output is +1 or -1, whatever the input. Where the values of a
        batch are nearly alike (crops of one scan, frames of one clip, one class) the difference
        *between* batches is the signal, and it is subtracted. In eval mode, with running
        statistics, it suddenly appears: the network meets values that it never saw in training.

    Evidence:
        Either n, the values per channel of the usual batch; or the share of a channel's variance
        that lies within batches, biased within-batch variance / (itself + variance of the batch
        means), the median over channels. The variance of the means is taken from successive
        differences, so that drift of the weights does not count as variance. A harmless mode gap
        does not lower it: it is measured on one batch, of evaluation, and hides what lies between
        batches.

    Limits:
        min_values_per_channel: Fewer than 3 leave nothing but a sign.
        min_within_batch_share: 0.2. Independent values give (n - 1) / n, or 1 - 1/samples where
            the positions of a sample are all alike, which is 0.5 for two samples; healthy runs of
            the tests stay above 0.4, crops of one image at a time fall below 0.1.
        min_batches: Batches in the window before the share is judged: 8.

    Fix:
        Enlarge what one batch holds (more samples, or samples from more sources), or replace the
        layers by GroupNorm, which needs no batch and did better than BN in classifiers
        that were swapped and fine-tuned at batch 2 (BN202)::

            swapped = bnguard.swap(model, to="group", teacher_data=train_loader).model

        With several devices: ``torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)``.

    Which norm:
        GroupNorm, whose statistics are those of one sample. BN202 has the figures of BN,
        GroupNorm and batch renormalisation (Wu & He, table 2).

    Fix safety:
        Another norm changes the network, and a swap without ``teacher_data`` most of what it
        knew: let it learn, then measure it. Recalibration helps eval mode only; what training
        subtracted was not learnt.

    References:
        Wu & He, "Group Normalization" (2018), figure 1.
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 3.
    """

    code: ClassVar[str] = "BN201"
    name: ClassVar[str] = "variance-collapse"
    explains: ClassVar[tuple[str, ...]] = ("BN202", "BN301", "BN302")

    min_values_per_channel: int = 3
    min_within_batch_share: float = 0.2
    min_batches: int = 8

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Hold n and the within-batch share of the variance against their limits."""
        n = layer.typical_values_per_channel
        if n is not None and 1 < n < self.min_values_per_channel:
            yield self._finding(
                layer,
                Severity.WARNING,
                f"batches have {n} values per channel here: normalised, only their order is left",
                Evidence("values per channel", n, self.min_values_per_channel, is_minimum=True),
                _FIX,
            )
            return
        if layer.window is None:
            yield self._skipped(layer, "no batch statistics were observed")
            return
        share = _within_batch_share(layer.window, n, self.min_batches)
        if share is None:
            yield self._skipped(
                layer, f"fewer than {self.min_batches} batches with variance in the window"
            )
        elif share < self.min_within_batch_share:
            yield self._finding(
                layer,
                Severity.WARNING,
                "the values of a batch are nearly alike here: most of the variance lies between "
                "batches, and normalising removes it",
                Evidence(
                    "within-batch share of the variance",
                    share,
                    self.min_within_batch_share,
                    is_minimum=True,
                ),
                _FIX,
            )


_FIX = Fix("enlarge or mix the batches, or use GroupNorm here")


def _within_batch_share(window: BatchWindow, n: int | None, min_batches: int) -> float | None:
    biased = window.var_unbiased if n is None else window.var_unbiased * ((n - 1) / n)
    total = biased + window.var_of_means_successive
    judged = (window.batches >= min_batches) & np.isfinite(total) & (total > 0.0)
    if not judged.any():
        return None
    return float(np.median(biased[judged] / total[judged]))
