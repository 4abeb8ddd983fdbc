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
from bnguard.rules.measurements import distance_of, is_lasting


@dataclass(frozen=True, kw_only=True)
class FrozenButUpdating(Rule):
    """The running statistics of a frozen layer keep changing.

    Why it matters:
        ``requires_grad = False`` freezes gamma and beta, but not the running statistics: every
        forward in train mode moves those. A "frozen" backbone drifts to the new data and loses the
        features that it was trained for.

    What you see:
        Fine-tuning looks normal. On the original task the network gets worse from epoch to epoch,
        and a second head on the same backbone, which nobody touched, fails.

    Example:
        Fine-tuning a head on a frozen backbone::

            # Fault: gamma and beta stop, the running statistics do not.
            for parameter in backbone.parameters():
                parameter.requires_grad = False
            # Fix: after each model.train(), which undoes it.
            model.train()
            backbone.eval()

    Fix:
        Keep frozen layers in eval mode, or unfreeze gamma and beta too if the statistics should
        follow the new data. Loading the original weights restores statistics that have already
        moved.

    What it does not mean:
        Not every layer with frozen gamma and beta is a fault. It is ``info`` if its statistics have
        to follow weights, because those before the layer are trained, or its own are averages of
        others (a momentum encoder); if all calls in train mode ran under ``torch.no_grad`` (a
        teacher) and its statistics still fit evaluation; and before the second training step, which
        shows whether something averages the weights. Layers without gamma and beta are not judged.

    Evidence:
        Updates of the running statistics while gamma and beta are frozen: ``requires_grad`` is
        False, or they do not change and no optimizer that bnguard knows holds them. The message
        says which, and how far a mean has moved, in σ. If those optimizers hold no parameter of the
        model at all, because they were built for another one, it says so.

    Limits:
        max_updates: 0 updates, since the first one already changes the layer.

    References:
        pytorch/pytorch#86590, "Easy way to 'freeze' BatchNorm running_mean/running_var".
        Piyush-555/GaussianDistillation#2, a teacher in train mode.
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

    def is_harmless(self, layer: LayerHistory) -> bool:
        """Return whether the statistics of a frozen layer have to move, or may."""
        if not layer.calls.are_without_grad:
            return _is_following_weights(layer)
        return not (self.has_done_harm(layer) and is_lasting(layer.run))

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare the updates seen in training with what a frozen layer may have."""
        if layer.training is None:
            yield self.skip(layer, "a checkpoint does not say which layers are frozen")
            return
        if not layer.is_affine_frozen:
            return
        if layer.run.steps == 0 and layer.training and not layer.is_left_out:
            yield self.make_finding(
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
        reason, fix = _why(layer)
        reason += ", but the layer is in train mode and its running statistics move"
        if _is_following_weights(layer):
            reason += " with the weights, which are trained or averaged"
            fix = fix if layer.is_left_out else Fix(_NONE)
        yield self.make_finding(
            layer,
            # What averages the weights may do so after the step, or at the start of the next.
            Severity.INFO if layer.run.steps < 2 or self.is_harmless(layer) else Severity.WARNING,
            reason + _distance(layer),
            Evidence("updates while frozen", layer.updates_seen, self.max_updates),
            fix,
        )


_FREEZE = "call .eval() on the frozen layers after every model.train()"
_NONE = "none, if this is meant: in eval mode the statistics would not follow the weights"


def _is_following_weights(layer: LayerHistory) -> bool:
    return layer.has_moving_weights and not layer.calls.are_without_grad


def _why(layer: LayerHistory) -> tuple[str, Fix]:
    """Return why gamma and beta do not change, and what to do about it."""
    if not layer.is_left_out:
        return "gamma and beta are frozen", Fix(_FREEZE)
    if layer.run.is_optimized is False:
        return (
            "the optimizer holds none of this model's parameters, so gamma and beta do not change",
            Fix("build the optimizer from model.parameters(), once the model is complete"),
        )
    return (
        "no optimizer holds gamma and beta, so they do not change",
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
