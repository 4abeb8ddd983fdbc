"""BN205 double-update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class DoubleUpdate(Rule):
    """Each batch updates the running statistics twice.

    Why it matters:
        Activation checkpointing runs a part of the network again in the backward, and that second
        forward updates the running statistics with the same batch. The momentum acts like 1 - (1 -
        momentum)^2, 0.19 instead of 0.1: the average forgets twice as fast and is noisier.

    What you see:
        A run with checkpointing validates slightly worse, or less steadily, than the same run
        without it. ``num_batches_tracked`` rises by 2 per step.

    Example:
        A checkpointed block::

            # Fault: the backward calls the BN layers of the block again
            from torch.utils.checkpoint import checkpoint
            checkpoint(block, batch, use_reentrant=False).sum().backward()
            # Fix: halve the effect of each update
            layer.momentum = 1 - math.sqrt(1 - layer.momentum)

    Fix:
        Change the momentum as above, or checkpoint only what contains no BN layer. The running
        statistics become those of a run without checkpointing.

    What it does not mean:
        Two calls with different batches, as with accumulation or two streams, are not a double
        update.

    Evidence:
        Share of the calls with batch statistics that ran inside a backward.

    Limits:
        max_recomputed_share: 0.25 of the calls; checkpointing makes it 0.5.

    References:
        pytorch/pytorch#96136, "torch.utils.checkpoint should avoid updating BatchNorm statistics
            twice".
        Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016), arXiv:1604.06174.
    """

    code: ClassVar[str] = "BN205"
    name: ClassVar[str] = "double-update"

    max_recomputed_share: float = 0.25

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare the share of calls inside a backward with the limit."""
        if layer.running is None or not layer.calls.in_training:
            return
        share = layer.calls.recomputed / layer.calls.in_training
        if share <= self.max_recomputed_share or not layer.is_updating or layer.momentum is None:
            return
        momentum = layer.momentum
        if not 0.0 <= momentum <= 1.0:
            yield self.skip(layer, f"momentum {momentum:g} is not between 0 and 1 (BN103)")
            return
        yield self.make_finding(
            layer,
            Severity.WARNING,
            "every batch updates the statistics twice, the second time when its activations are "
            f"recomputed: momentum {momentum:g} acts like {1 - (1 - momentum) ** 2:.2g}",
            Evidence("share of recomputed calls", share, self.max_recomputed_share),
            Fix(f"use momentum={1 - (1 - momentum) ** 0.5:.2g} in the checkpointed layers"),
        )
