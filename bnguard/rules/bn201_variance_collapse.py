"""BN201 variance-collapse."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import BatchWindow, LayerHistory
from bnguard.rules.base import Rule
from bnguard.rules.measurements import is_unused


@dataclass(frozen=True, kw_only=True)
class VarianceCollapse(Rule):
    """Batches are so small or so uniform that normalising them erases the signal.

    Why it matters:
        BN keeps what distinguishes the values of one batch and removes what they share. With two
        values per channel every output is +1 or -1, for any input. If the values of a batch are
        nearly alike (crops of one scan, frames of one clip, one class), the signal is the
        difference *between* batches, and BN subtracts it.

    What you see:
        The training loss hardly falls, or falls with a score that no evaluation confirms. In eval
        mode the network meets differences that it never saw in training.

    Example:
        Batches of crops of one image::

            # Fault
            crops = batch[:1].expand(8, -1, -1, -1)
            outputs = model(crops)
            # Fix: samples from several images, or a norm that needs no batch
            outputs = model(batch)
            swapped = bnguard.swap(model, to="group", teacher_data=train_loader).model

    Fix:
        Put more samples, or samples from more sources, into a batch; on several devices, use
        SyncBatchNorm. Or use GroupNorm; BN202 says which norm for whom. A swap without
        ``teacher_data`` loses most of what the network knew: train it, and measure it.
        Recalibration helps eval mode only; what training subtracted was never learned.

    What it does not mean:
        A small batch alone is not a collapse: see BN202. A harmless mode gap (BN302) does not
        disprove the finding, since it compares the modes on one batch, and the signal is between
        batches. Tiny batches of a layer that evaluation does not call are ``info``.

    Evidence:
        n, the values per channel of a typical batch; or the share of a channel's variance that is
        within batches, biased within-batch variance / (itself + variance of the batch means), the
        median over channels that vary (BN204 has the others). The variance of the means comes from
        successive differences, so that slow changes of the weights do not count.

    Limits:
        min_values_per_channel: 3, since fewer leave nothing but a sign.
        min_within_batch_share: 0.2. Independent values give (n - 1) / n, or 1 - 1/samples if the
            positions of a sample are all alike: 0.5 for two samples. Healthy runs of the tests stay
            above 0.4, crops of one image at a time fall below 0.1.
        min_batches: 8 batches before n is judged, and in the window before the share is.

    References:
        Wu & He, "Group Normalization" (2018), figure 1, arXiv:1803.08494.
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 4, arXiv:2105.07576.
        VainF/DeepLabV3Plus-Pytorch#27, BN after global pooling.
    """

    code: ClassVar[str] = "BN201"
    name: ClassVar[str] = "variance-collapse"
    explains: ClassVar[tuple[str, ...]] = ("BN202", "BN301", "BN302")

    min_values_per_channel: int = 3
    min_within_batch_share: float = 0.2
    min_batches: int = 8

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare n and the within-batch share of the variance with their limits."""
        n = layer.typical_values_per_channel
        # An expert that a gate gives up has a few small batches before.
        batches = sum(layer.values_per_channel.values())
        if n is not None and 1 < n < self.min_values_per_channel and batches >= self.min_batches:
            yield self.make_finding(
                layer,
                Severity.INFO if is_unused(layer) else Severity.WARNING,
                f"batches have {n} values per channel here: normalising leaves only their order",
                Evidence("values per channel", n, self.min_values_per_channel, is_minimum=True),
                _FIX,
            )
            return
        if layer.window is None:
            yield self.skip(layer, "no batch statistics were observed")
            return
        least = _LEAST_VAR_IN_EPS * min(layer.eps, 1e-5)
        share = _within_batch_share(layer.window, n, self.min_batches, least)
        if share is None:
            yield self.skip(
                layer, f"fewer than {self.min_batches} batches with variance in the window"
            )
        elif share < self.min_within_batch_share:
            yield self.make_finding(
                layer,
                Severity.WARNING,
                "the values of a batch are nearly alike here: most of the variance is between "
                "batches, and normalising removes it",
                Evidence(
                    "within-batch share of the variance",
                    share,
                    self.min_within_batch_share,
                    is_minimum=True,
                ),
                _FIX,
            )


# Share of eps, at most of PyTorch's, below which a variance is that of a dead channel (BN204).
_LEAST_VAR_IN_EPS = 0.1

_FIX = Fix("enlarge or mix the batches, or use GroupNorm here")


def _within_batch_share(
    window: BatchWindow, n: int | None, min_batches: int, least: float
) -> float | None:
    biased = window.var_unbiased if n is None else window.var_unbiased * ((n - 1) / n)
    total = biased + window.var_of_means_successive
    judged = (window.batches >= min_batches) & np.isfinite(total) & (total > least)
    if not judged.any():
        return None
    return float(np.median(biased[judged] / total[judged]))
