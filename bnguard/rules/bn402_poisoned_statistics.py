"""BN402 poisoned-statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class PoisonedStatistics(Rule):
    """The running statistics contain NaN or Inf, and averaging never removes it.

    Why it matters:
        One bad batch is enough: a running average with a NaN stays NaN, however good the later
        batches are. Training goes on, since it uses the statistics of each batch; every evaluation
        is invalid. Skipping the optimizer step, as a gradient scaler does, does not help: the
        forward has already updated the statistics.

    What you see:
        The training loss is normal, and validation is NaN, or at chance, from one epoch to the
        next.

    Example:
        One bad batch::

            # Fault
            outputs = model(batch * float("inf"))
            # Fix: restore the last finite statistics in the same step
            monitor = bnguard.watch(model, restore_poisoned=True)
            # or compute new ones
            bnguard.recalibrate(model, train_loader)

    Fix:
        Watch with ``restore_poisoned=True``, which leaves one batch out of the average. Recalibrate
        checkpoints that are already poisoned. If gamma, beta or other weights are not finite, no
        statistics can repair the network: go back to an earlier checkpoint.

    What it does not mean:
        It does not say what made the NaN: that is BN401. If bnguard restored the statistics, it is
        a ``warning``, since the bad batch is still worth a look.

    Evidence:
        The number of channels whose running mean or variance is not finite, and the first step
        after which that was so. A gamma or beta that is not finite is an ``error`` too, next to
        finite statistics.

    Limits:
        max_bad_channels: 0, since one NaN channel makes every output NaN.

    References:
        pytorch/pytorch#88474, "Mixed precision training fails due to NaN in batch norm
            running_mean".
    """

    code: ClassVar[str] = "BN402"
    name: ClassVar[str] = "poisoned-statistics"
    is_static: ClassVar[bool] = True
    explains: ClassVar[tuple[str, ...]] = ("BN201", "BN204", "BN302")

    max_bad_channels: int = 0

    def has_done_harm(self, layer: LayerHistory) -> bool:
        """Return whether the statistics were not finite when they were evaluated."""
        return layer.evaluated is None or bool(layer.evaluated.running.bad_channels)

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Count the channels whose running statistics are not finite, now or when restored."""
        if layer.running is None:
            yield self.skip(layer, "the layer keeps no running statistics")
            return
        bad = layer.running.bad_channels
        if len(bad) > self.max_bad_channels:
            yield self.make_finding(
                layer,
                Severity.ERROR,
                "the running statistics contain NaN or Inf: every evaluation from now on is invalid"
                + ("" if layer.has_finite_affine else "; gamma or beta is not finite either"),
                Evidence("channels not finite", len(bad), self.max_bad_channels),
                _way_out(layer),
                channels=bad,
                step=layer.poisoned_step,
            )
        elif not layer.has_finite_affine:
            restored = ", since bnguard restored them" if layer.restored_updates else ""
            yield self.make_finding(
                layer,
                Severity.ERROR,
                "gamma or beta contains NaN or Inf, and so does every output; the running "
                f"statistics are finite{restored}",
                Evidence("parameters not finite", 1, 0),
                _way_out(layer),
                step=layer.poisoned_step,
            )
        elif layer.restored_updates:
            yield self.make_finding(
                layer,
                Severity.WARNING,
                "a batch put NaN or Inf into the running statistics, and bnguard restored the last "
                "finite ones",
                Evidence("restored updates", layer.restored_updates, 0),
                Fix("check the batch of that step: its loss was not finite either"),
                step=layer.poisoned_step,
            )


def _way_out(layer: LayerHistory) -> Fix:
    if not layer.has_finite_affine:
        return Fix("go back to a checkpoint whose weights are finite")
    return Fix(
        "watch with restore_poisoned=True; recalibrate a network that is already poisoned",
        "recalibrate",
    )
