"""BN106 unsynchronised-small-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped, counted
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class UnsynchronisedSmallBatch(Rule):
    """Several processes train together, and each normalises its own few samples.

    Why it matters:
        Data-parallel training averages gradients over the ranks, but not batch statistics. With 2
        samples on each of 8 ranks, the optimizer sees a batch of 16 and each BN layer one of 2.

    What you see:
        The same total batch gives a better score on one device than on many. More ranks do not
        help, larger batches per rank do.

    Example:
        DDP with 2 samples per rank::

            # Fault
            parallel = DistributedDataParallel(model)
            # Fix
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            parallel = DistributedDataParallel(model)

    Fix:
        Convert before wrapping, or use ``Trainer(sync_batchnorm=True)``. Each step then waits for
        one exchange per layer. Subclasses with an activation lose it (BN108), except in
        ``bnguard.swap(model, "sync").model``. If all ranks together have fewer than 16 samples, use
        GroupNorm; BN202 says which norm for whom.

    What it does not mean:
        With 16 and more samples per rank, BN without synchronisation is what most published models
        use.

    Evidence:
        Samples that a layer of a class without synchronisation normalises at once, if more than one
        rank trains.

    Limits:
        min_samples: 8. On ImageNet a ResNet-50 loses 1.2 points of accuracy from 32 samples to 8,
            3.7 at 4 and 11.1 at 2 (Wu & He, table 2).

    References:
        Peng et al., "MegDet: A Large Mini-Batch Object Detector" (2018), on cross-GPU
            BN, arXiv:1711.07240.
        Wu & He, "Group Normalization" (2018), table 2, arXiv:1803.08494.
        pytorch/pytorch#2584, "Synchronize Batch Norm across Multi GPUs".
        fundamentalvision/BEVFormer#136, one sample per GPU.
    """

    code: ClassVar[str] = "BN106"
    name: ClassVar[str] = "unsynchronised-small-batch"
    explains: ClassVar[tuple[str, ...]] = ("BN201", "BN202", "BN210")

    min_samples: int = 8

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare the samples per rank with the limit."""
        if layer.run.plan.ranks < 2 or "Sync" in layer.kind or layer.training is False:
            return
        samples = layer.samples or layer.run.plan.batch_size
        if samples is None:
            yield self.skip(layer, "no batch has reached the layer yet")
        elif samples < self.min_samples:
            yield self.make_finding(
                layer,
                Severity.WARNING,
                f"each of {layer.run.plan.ranks} ranks normalises its own "
                f"{counted(samples, 'sample')}",
                Evidence("samples per rank", samples, self.min_samples, is_minimum=True),
                Fix("use torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) before wrapping it"),
            )
