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
    """NaN or Inf has entered the running statistics, and averaging never takes it out.

    Why it matters:
        One bad batch is enough: a running average that holds a NaN stays NaN, however good all
        later batches are. Training goes on as if nothing had happened, because it uses the
        statistics of each batch; every evaluation from then on is NaN. Skipping the optimizer
        step, as a gradient scaler does, does not help: the forward has already updated them.

    Evidence:
        The number of channels whose running mean or variance is not finite, and the first step
        after which that was so. Where bnguard put the last finite statistics back in that step,
        the finding is a ``warning``: the bad batch is still worth a look. Finite statistics next to
        a gamma or beta that is not are an ``error`` as well: the batch has reached the weights.

    Limits:
        max_bad_channels: 0, since one NaN channel makes every output NaN.

    Fix:
        Put the last finite statistics back in the step in which they are poisoned::

            bnguard.watch(model, restore_poisoned=True)

        On a checkpoint that is poisoned already, estimate them again::

            bnguard.recalibrate(model, train_loader)

    Fix safety:
        Safe: the statistics of one batch are left out of the average. Where gamma, beta or other
        weights are not finite themselves, no statistics can repair the network: go back to an
        earlier checkpoint.

    References:
        PyTorch issue 88474, "Mixed precision training fails due to NaN in batch norm
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
            yield self._skipped(layer, "the layer keeps no running statistics")
            return
        bad = layer.running.bad_channels
        if len(bad) > self.max_bad_channels:
            yield self._finding(
                layer,
                Severity.ERROR,
                "the running statistics are NaN or infinite: every evaluation is, from now on"
                + ("" if layer.has_finite_affine else "; gamma or beta is not finite either"),
                Evidence("channels not finite", len(bad), self.max_bad_channels),
                _way_out(layer),
                channels=bad,
                step=layer.poisoned_step,
            )
        elif not layer.has_finite_affine:
            put_back = ", since they were restored" if layer.restored_updates else ""
            yield self._finding(
                layer,
                Severity.ERROR,
                "gamma or beta is NaN or infinite, and every output is; the running statistics are "
                f"finite{put_back}",
                Evidence("parameters not finite", 1, 0),
                _way_out(layer),
                step=layer.poisoned_step,
            )
        elif layer.restored_updates:
            yield self._finding(
                layer,
                Severity.WARNING,
                "a batch made the running statistics NaN or infinite, and the last finite ones "
                "were restored",
                Evidence("restored updates", layer.restored_updates, 0),
                Fix("look at the batch of that step: its loss was not finite either"),
                step=layer.poisoned_step,
            )


def _way_out(layer: LayerHistory) -> Fix:
    if not layer.has_finite_affine:
        return Fix("go back to a checkpoint whose weights are finite")
    return Fix(
        "watch with restore_poisoned=True; recalibrate what is poisoned already", "recalibrate"
    )
