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
        Activation checkpointing runs a part of the network again in the backward. The second
        forward updates the running statistics with the same batch: the effective momentum is
        1 - (1 - momentum)^2, 0.19 in place of 0.1, the average forgets twice as fast, and its
        noise rises. Runs with and without checkpointing are no longer comparable.

    Evidence:
        Share of the calls with batch statistics that ran inside a backward. Two calls with
        different batches, as in accumulation or with two streams, do not count.

    Limits:
        max_recomputed_share: 0.25 of the calls; checkpointing makes it 0.5.

    Fix:
        Halve the effect of each update::

            layer.momentum = 1 - math.sqrt(1 - layer.momentum)

        or leave BN layers outside of what is checkpointed.

    Fix safety:
        Safe: the running statistics become those of a run without checkpointing.

    References:
        PyTorch issue 96136, "torch.utils.checkpoint should avoid updating BatchNorm statistics
            twice".
    """

    code: ClassVar[str] = "BN205"
    name: ClassVar[str] = "double-update"

    max_recomputed_share: float = 0.25

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Hold the share of calls inside a backward against the limit."""
        if layer.running is None or not layer.calls.in_training:
            return
        share = layer.calls.recomputed / layer.calls.in_training
        if share <= self.max_recomputed_share or not layer.is_updating or layer.momentum is None:
            return
        momentum = layer.momentum
        if not 0.0 <= momentum <= 1.0:
            yield self._skipped(layer, f"momentum {momentum:g} makes no average (BN103)")
            return
        yield self._finding(
            layer,
            Severity.WARNING,
            "every batch updates the statistics twice, the second time when its activations are "
            f"recomputed: momentum {momentum:g} acts like {1 - (1 - momentum) ** 2:.2g}",
            Evidence("share of recomputed calls", share, self.max_recomputed_share),
            Fix(f"momentum={1 - (1 - momentum) ** 0.5:.2g} on the checkpointed layers"),
        )
