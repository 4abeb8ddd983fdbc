"""BN101 frozen-but-updating."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.layers.distances import shift_std
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule
from bnguard.rules.measurements import distance_of


@dataclass(frozen=True, kw_only=True)
class FrozenButUpdating(Rule):
    """A layer whose parameters are frozen goes on changing its running statistics.

    Why it matters:
        ``requires_grad = False`` stops gamma and beta, not the running statistics: those move
        with every forward in train mode. A "frozen" backbone drifts to the new data, its features
        are no longer those it was trained with, and it cannot be shared or compared any more.

    Evidence:
        Updates of the running statistics while every affine parameter of the layer is frozen:
        ``requires_grad`` is False, or the parameters stand still and are in none of the
        optimizers that bnguard was given. The message says which, and how far a mean has moved,
        in σ. Where those optimizers hold no parameter of the model at all (they were built for
        another, or before its parameters were replaced) it says so, since nothing learns.
        Of severity ``info`` where every training-mode call ran under ``torch.no_grad``: a teacher
        network is kept like that on purpose, unless its statistics no longer fit what it is
        evaluated on; and of a model that has not trained yet, where a
        frozen layer is in train mode. Layers without affine parameters are not judged.

    Limits:
        max_updates: Updates allowed while frozen; 0, since the first is already a defect.

    Fix:
        Put the frozen layers into eval mode, after each call of ``model.train()``, which undoes
        it::

            for module in backbone.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()

        Where the statistics should follow the new data, unfreeze the affine parameters as well.

    Fix safety:
        Safe for a pretrained backbone. From then on training and evaluation use the same, fixed
        statistics; statistics that have already moved are put back by loading the original
        weights again.

    References:
        PyTorch issue 86590, "Easy way to 'freeze' BatchNorm running_mean/running_var".
        torchvision.ops.FrozenBatchNorm2d, made for detection backbones.
    """

    code: ClassVar[str] = "BN101"
    name: ClassVar[str] = "frozen-but-updating"
    is_static: ClassVar[bool] = True
    is_local: ClassVar[bool] = True
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")

    max_updates: int = 0

    def has_done_harm(self, layer: LayerHistory) -> bool:
        """Return whether the statistics of a teacher no longer fit; others follow their batches."""
        distance = distance_of(layer) if layer.calls.are_without_grad else None
        return distance is not None and distance.is_beyond

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare the updates seen in training with what a frozen layer may have."""
        if layer.training is None:
            yield self._skipped(layer, "a checkpoint does not say which layers are frozen")
            return
        if not layer.is_affine_frozen:
            return
        if layer.run.steps == 0 and layer.training and not layer.is_left_out:
            yield self._finding(
                layer,
                Severity.INFO,
                "gamma and beta are frozen, but the layer is in train mode: each batch of training "
                "will move its running statistics",
                Evidence("frozen layers in train mode", 1, 0),
                Fix(_FREEZE),
            )
            return
        if layer.updates_seen <= self.max_updates:
            return
        is_harmless = layer.calls.are_without_grad and not self.has_done_harm(layer)
        reason, fix = _why(layer)
        yield self._finding(
            layer,
            Severity.INFO if is_harmless else Severity.WARNING,
            f"{reason}, but the layer is in train mode and its running statistics "
            f"move{_distance(layer)}",
            Evidence("updates while frozen", layer.updates_seen, self.max_updates),
            fix,
        )


_FREEZE = "call .eval() on the frozen layers after every model.train()"


def _why(layer: LayerHistory) -> tuple[str, Fix]:
    """Return why gamma and beta do not learn, and what to do about it."""
    if not layer.is_left_out:
        return "gamma and beta are frozen", Fix(_FREEZE)
    if layer.run.is_optimized is False:
        return (
            "the optimizer given holds none of this model's parameters, and gamma and beta stand "
            "still",
            Fix("build the optimizer from model.parameters() after their last replacement"),
        )
    return (
        "no optimizer holds gamma and beta, which stand still",
        Fix(f"{_FREEZE}, or give the optimizer their parameters"),
    )


def _distance(layer: LayerHistory) -> str:
    start, now = layer.running_at_start, layer.running
    if start is None or now is None or now.bad_channels or start.bad_channels:
        return ""
    if start.mean.shape != now.mean.shape:
        return ""
    moved = np.abs(shift_std(now.mean, start.mean, start.var, layer.eps))
    return f": a mean has moved {np.max(moved, initial=0.0):.2g} σ"
