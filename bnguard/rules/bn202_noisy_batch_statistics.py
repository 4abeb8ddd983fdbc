"""BN202 noisy-batch-statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped, counted
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class NoisyBatchStatistics(Rule):
    """The batch statistics jump from batch to batch: they come from too few values.

    Why it matters:
        A little noise regularises. But if the mean that BN subtracts is off by half a standard
        deviation each time, every step optimises another function, and evaluation uses none of
        them. The running statistics, an average of few such batches, are noisy too.

    What you see:
        A loss that stays noisy at any learning rate, a validation score that jumps between epochs,
        and a clearly better run with a larger batch.

    Example:
        Images so large that a device holds two::

            # Fault
            loader = DataLoader(dataset, batch_size=2, shuffle=True)
            # Fix: a larger batch, a norm that needs none, or shared statistics
            loader = DataLoader(dataset, batch_size=32, shuffle=True)
            swapped = bnguard.swap(model, to="group", teacher_data=train_loader).model
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)

    Fix:
        Enlarge the batch, share statistics between devices, or use another norm. A smaller
        ``momentum`` and a recalibration help eval mode only. A swap without ``teacher_data`` loses
        most of what the network knew: train it, and measure it.

    Which norm:
        Error of a ResNet-50 on ImageNet at 32, 16, 8, 4 and 2 samples per device: 23.6, 23.7, 24.8,
        27.3 and 34.7 % with BN; 24.1, 24.2, 24.0, 24.2 and 24.1 % with GroupNorm of 32 groups (Wu &
        He, table 2). So: BN from some 16 samples on, GroupNorm below, SyncBatchNorm if the devices
        together have 16, at the cost of one exchange per layer.

        Batch renormalisation keeps running statistics: an Inception-v3 with batches of 4 reached
        76.5 % accuracy with it and 74.2 % with BN (Ioffe 2017, section 4.2). InstanceNorm suits
        tasks where contrast should not count, LayerNorm suits sequences. Only BN can be folded into
        the convolution before it for deployment. A detector fine-tuned with 2 images per device
        gains 1.5 points of box AP from GroupNorm over frozen BN, for up to 13 % more time and 22 %
        more memory (Detectron).

        After one epoch of fine-tuning at batch 2, a small DenseNet (98.4 % of digits right before)
        had 96.4 % with BN, 97.4 % with a swap distilled for 200 steps, 96.0 % with a GroupNorm that
        took over gamma and beta, 93.8 % from scratch; a small MobileNet (98.5 %) 96.2, 98.0, 96.0
        and 97.8 %. A U-Net, with many positions per sample, lost: 92.6 % Dice with BN, 92.2 % with
        a swap (``python -m tests.benchmarks.swap``, means of three seeds).

    What it does not mean:
        It does not say that the network cannot learn: many networks train with noisy statistics,
        and lose some points. A harmless mode gap (BN302) does not disprove it, since it is measured
        on a larger batch of evaluation.

    Evidence:
        The standard deviation of the batch means, in standard deviations of the values, the median
        over channels, from successive differences. Independent values give 1/sqrt(n); if the
        positions of a sample are alike, up to 1/sqrt(samples).

    Limits:
        max_noise_std: 0.42. Independent samples give at most 0.35 at 8 per batch, and 0.5 at 4.
            95 % of the healthy runs of the zoo stay below 0.18, batches of 8 below 0.39; batches of
            four have 0.45 to 0.47.
        min_batches: 8 batches in the window before they are judged.
        max_samples: 7 samples. In larger batches the data (BN203) or the weights jump.

    References:
        Wu & He, "Group Normalization" (2018), table 2, arXiv:1803.08494.
        Ioffe, "Batch Renormalization" (2017), section 3, arXiv:1702.03275.
        Detectron, projects/GN (2018): Mask R-CNN, R-50-FPN, 2x schedule.
        von Neumann et al., "The mean square successive difference" (1941).
        uci-cbcl/UFold#18 and limhoyeon/ToothGroupNetwork#23, one sample per batch.
    """

    code: ClassVar[str] = "BN202"
    name: ClassVar[str] = "noisy-batch-statistics"
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")

    max_noise_std: float = 0.42
    min_batches: int = 8
    max_samples: int = 7

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare the spread of the batch means with the limit."""
        if layer.window is None or layer.samples is None:
            yield self.skip(layer, "no batch statistics were observed")
            return
        noise = layer.window.noise_std
        judged = (layer.window.batches >= self.min_batches) & np.isfinite(noise)
        if not judged.any():
            yield self.skip(layer, f"fewer than {self.min_batches} batches in the window")
            return
        spread = float(np.median(noise[judged]))
        if layer.samples > self.max_samples or spread <= self.max_noise_std:
            return
        yield self.make_finding(
            layer,
            Severity.WARNING,
            f"the mean of a batch of {counted(layer.samples, 'sample')} jumps by {spread:.2f} σ "
            "from batch to batch",
            Evidence("spread of the batch means", spread, self.max_noise_std, "σ"),
            Fix("enlarge or synchronise the batches, or use GroupNorm"),
        )
