"""BN202 noisy-batch-statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class NoisyBatchStatistics(Rule):
    """The statistics jump from batch to batch: too few values to estimate them from.

    Why it matters:
        A little noise regularises. Where the mean that is subtracted is off by half a standard
        deviation each time, training optimises another function at every step, and the function
        of evaluation is none of them. The running statistics, an average of few such batches, are
        noisy too.

    Evidence:
        The standard deviation of the batch means in standard deviations of the values, the median
        over channels, from successive differences, which slow drift of the weights does not enter.
        Independent values give 1/sqrt(n); where the positions of a sample are alike, it is up to
        1/sqrt(samples). A harmless mode gap does not lower it: it is measured on one batch of
        evaluation, which is larger, and not on those of training.

    Limits:
        max_noise_std: 0.42. Independent samples give up to 0.35 at 8 a batch, and 0.5 at 4. The
            healthy runs of the zoo stay below 0.39, batches of four lie at 0.45 to 0.47.
        min_batches: Batches in the window before they are judged: 8.
        max_samples: 7. Batches of more samples are not small: what jumps there is the data (BN203)
            or the weights.

    Fix:
        Enlarge the batch, share the statistics between devices, or use a norm without batch::

            torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            swapped = bnguard.swap(model, to="group", teacher_data=train_loader).model

        A smaller ``momentum`` and a recalibration help eval mode alone. A classifier is worth
        swapping before it is fine-tuned at batch 2: a small DenseNet (98.3 % of digits right) had
        95.0 % after an epoch with BN, 97.3 % with a swap that was taught for 200 steps, 95.6 %
        with a GroupNorm that took over gamma and beta, 93.0 % with one trained from scratch; a
        small Inception (99.3 %) 98.5, 99.0, 98.8 and 98.2 % (one run each).
        A U-Net, with many positions a sample, lost: 92.7 % Dice with BN, 92.2 % with a swap.

    Which norm:
        Error of a ResNet-50 on ImageNet at 32, 16, 8, 4 and 2 samples a device: 23.6, 23.7, 24.8,
        27.3 and 34.7 % with BN, 24.1, 24.2, 24.0, 24.2 and 24.1 % with GroupNorm of 32 groups (Wu
        & He, table 2). So: BN from some 16 samples on; GroupNorm below; SyncBatchNorm where the
        devices together have 16, at the cost of an exchange a layer. An Inception-v3 with batches
        of 4 had 74.2 % accuracy with BN and 76.5 % with batch renormalisation (Ioffe 2017, section
        4.2), which keeps running statistics. InstanceNorm is for style and contrast that should
        not count, LayerNorm for sequences. BN alone can be folded into the convolution before it
        when deployed; the others cost their own pass over the values there. A detector fine-tuned
        at 2 images a device gains 1.5 points of box AP from GroupNorm over frozen BN, for up to
        13 % more time and 22 % more memory (Detectron).

    Fix safety:
        Another norm changes the network, and a swap without ``teacher_data`` most of what it
        knew: let it learn, then measure it.

    References:
        Wu & He, "Group Normalization" (2018), table 2, error against batch size.
        Detectron, projects/GN (2018): Mask R-CNN, R-50-FPN, 2x schedule.
        Ioffe, "Batch Renormalization" (2017), section 3.
        von Neumann et al., "The mean square successive difference" (1941).
    """

    code: ClassVar[str] = "BN202"
    name: ClassVar[str] = "noisy-batch-statistics"
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")

    max_noise_std: float = 0.42
    min_batches: int = 8
    max_samples: int = 7

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Hold the spread of the batch means against the limit."""
        if layer.window is None or layer.samples is None:
            yield self._skipped(layer, "no batch statistics were observed")
            return
        noise = layer.window.noise_std
        judged = (layer.window.batches >= self.min_batches) & np.isfinite(noise)
        if not judged.any():
            yield self._skipped(layer, f"fewer than {self.min_batches} batches in the window")
            return
        spread = float(np.median(noise[judged]))
        if layer.samples > self.max_samples or spread <= self.max_noise_std:
            return
        yield self._finding(
            layer,
            Severity.WARNING,
            f"batches of {layer.samples} samples give a mean that jumps by {spread:.2f} σ from "
            "one to the next",
            Evidence("spread of the batch means", spread, self.max_noise_std, "σ"),
            Fix("enlarge or synchronise the batches, or use GroupNorm here"),
        )
