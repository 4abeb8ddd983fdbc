"""BN210 rank-disagreement."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class RankDisagreement(Rule):
    """The ranks of a distributed training have different running statistics.

    Why it matters:
        Each rank evaluates another network, so the score depends on the rank, and the checkpoint
        holds the statistics of rank 0, from its share of the data. DDP copies rank 0's buffers to
        the others before each forward in training, but not after the last one, and not with
        ``broadcast_buffers=False``.

    What you see:
        Ranks log different validation scores, and the reloaded checkpoint has a score that none of
        them logged.

    Example:
        DDP that leaves the buffers alone::

            # Fault
            parallel = DistributedDataParallel(model, broadcast_buffers=False)
            # Fix: new statistics from all ranks, or SyncBatchNorm before wrapping
            bnguard.recalibrate(model, train_loader)
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)

    Fix:
        Share the statistics in training, or recalibrate on all ranks before evaluation. Averaging
        the buffers by hand is right for means only: variances need the variance of the means added.

    What it does not mean:
        Small differences are normal: the last update of each rank comes from its own batch.

    Evidence:
        The largest distance of rank 0's running mean from that of another rank, in running standard
        deviations; the upper decile over channels.

    Limits:
        max_distance_std: 0.25, well above what one last update with momentum 0.1 leaves at 8
            samples (0.1 times 0.35 σ).

    References:
        pytorch/pytorch#13711, "In eval(), BatchNorm running_mean is different between different
            GPUs".
        torch.nn.parallel.DistributedDataParallel, on ``broadcast_buffers``.
    """

    code: ClassVar[str] = "BN210"
    name: ClassVar[str] = "rank-disagreement"
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")
    acts_by_statistics: ClassVar[bool] = True
    is_local: ClassVar[bool] = True

    max_distance_std: float = 0.25

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare the distance between ranks with the limit."""
        if layer.run.plan.ranks < 2 and layer.rank_shift_std is None:
            return
        distance = layer.rank_shift_std
        if distance is None or not np.isfinite(distance).any():
            yield self.skip(layer, "the ranks were not compared")
            return
        value = float(np.quantile(np.abs(distance[np.isfinite(distance)]), 0.9))
        if value <= self.max_distance_std:
            return
        yield self.make_finding(
            layer,
            Severity.WARNING,
            f"the running means of two ranks are {value:.2g} σ apart: each evaluates another "
            "network",
            Evidence("distance between ranks", value, self.max_distance_std, "σ"),
            Fix("use SyncBatchNorm, or recalibrate on all ranks before evaluation", "recalibrate"),
        )
