"""BN104 untracked-statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class UntrackedStatistics(Rule):
    """A layer keeps no running statistics, or no longer updates those that eval mode uses.

    Why it matters:
        Without running statistics eval mode normalises with the batch too: what the network says
        of a sample depends on the samples next to it, and a batch of one fails or is erased. Where
        tracking is switched off *after* the layer was built the statistics are still there:
        training uses the batch, evaluation the old values, and the two drift apart. Lightning's
        ``BaseFinetuning.freeze(train_bn=False)`` does this.

    Evidence:
        Calls in train mode whose batch entered no running statistics, while
        ``track_running_stats`` is False.

    Limits:
        max_untracked_calls: 0 in training; before training it is the setting that counts.

    Fix:
        Let the layer keep statistics, or, where it should be frozen, put it in eval mode::

            torch.nn.BatchNorm2d(channels, track_running_stats=True)
            frozen_layer.track_running_stats = True
            frozen_layer.eval()                     # after every model.train()

        Where a sample should be normalised by itself, InstanceNorm or GroupNorm say so.

    Fix safety:
        A network trained without statistics needs them estimated once
        (``bnguard.recalibrate``), after the layers were given buffers.

    References:
        Lightning pull request 15063, "Implement freeze batchnorm with freezing track running
            stats".
        torch.nn.BatchNorm2d, on ``track_running_stats``.
    """

    code: ClassVar[str] = "BN104"
    name: ClassVar[str] = "untracked-statistics"
    is_static: ClassVar[bool] = True
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")
    acts_by_statistics: ClassVar[bool] = True

    max_untracked_calls: int = 0

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Look for layers that normalise in training with what they do not keep."""
        if 0 < layer.calls.in_training <= self.max_untracked_calls:
            return
        evidence = Evidence(
            "untracked calls in training",
            max(layer.calls.in_training, self.max_untracked_calls + 1),
            self.max_untracked_calls,
        )
        has_no_values_yet = layer.channels == 0 or layer.statistics_dtype is not None
        if layer.running is None and has_no_values_yet:
            yield self._skipped(layer, "the running statistics hold no values yet")
        elif layer.running is None:
            yield self._finding(
                layer,
                Severity.WARNING,
                "there are no running statistics: in eval mode too, the output for a sample "
                "depends on the rest of its batch",
                evidence,
                Fix("track_running_stats=True, or GroupNorm, which needs no batch"),
            )
        elif not layer.is_updating and (layer.training or layer.calls.in_training):
            yield self._finding(
                layer,
                Severity.WARNING,
                "tracking was switched off: training uses the statistics of the batch, "
                "evaluation the old running ones",
                evidence,
                Fix("track_running_stats = True, and eval() where the layer should stay frozen"),
            )
