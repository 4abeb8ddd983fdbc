"""BN106 unsynchronised-small-batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class UnsynchronisedSmallBatch(Rule):
    """Several processes train together, and each normalises its own few samples.

    Why it matters:
        Data-parallel training adds gradients over the ranks, not batch statistics: with 2 samples
        a rank on 8 ranks the optimizer sees a batch of 16, each BN layer one of 2. Error rises as
        if the batch were 2.

    Evidence:
        Samples that a layer of a class without synchronisation normalises at once, where more
        than one rank trains.

    Limits:
        min_samples: 8. On ImageNet ResNet-50 loses 1.2 points of accuracy from 32 samples to 8,
            3.7 at 4 and 11.1 at 2 (Wu & He, table 2).

    Fix:
        Share the statistics, before the model is wrapped::

            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)

        or ``Trainer(sync_batchnorm=True)``. Subclasses with an activation lose it (BN108), but
        not in ``bnguard.swap(model, "sync").model``. Where the ranks are too few, group norm
        errs by 24.1 % at 2 samples, where BN errs by 34.7 % (table 2).

    Which norm:
        SyncBatchNorm where all ranks together have 16 samples or more, GroupNorm otherwise.
        BN202 has the figures of BN, GroupNorm and batch renormalisation (Wu & He, table 2).

    Fix safety:
        Training changes, for the better; every step waits for an exchange a layer.

    References:
        Peng et al., "MegDet: A Large Mini-Batch Object Detector" (2018), on cross-GPU BN.
        Wu & He, "Group Normalization" (2018), table 2.
    """

    code: ClassVar[str] = "BN106"
    name: ClassVar[str] = "unsynchronised-small-batch"
    explains: ClassVar[tuple[str, ...]] = ("BN201", "BN202", "BN210")

    min_samples: int = 8

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Hold the samples a rank against the limit."""
        if layer.run.plan.ranks < 2 or "Sync" in layer.kind or layer.training is False:
            return
        samples = layer.samples or layer.run.plan.batch_size
        if samples is None:
            yield self._skipped(layer, "no batch has reached the layer yet")
        elif samples < self.min_samples:
            yield self._finding(
                layer,
                Severity.WARNING,
                f"each of {layer.run.plan.ranks} ranks normalises {samples} samples by itself",
                Evidence("samples a rank", samples, self.min_samples, is_minimum=True),
                Fix("torch.nn.SyncBatchNorm.convert_sync_batchnorm(model) before wrapping"),
            )
