"""BN103 momentum-out-of-range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.layers.distances import DEFAULT_MOMENTUM
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule
from bnguard.rules.measurements import fits, is_known_cause_harmless


@dataclass(frozen=True, kw_only=True)
class MomentumOutOfRange(Rule):
    """Momentum keeps only the newest batches in the running statistics, or none of them.

    Why it matters:
        ``momentum`` is the weight of the *new* batch in PyTorch, but of the old average in Keras
        and TensorFlow. A 0.99 copied from there keeps 1 % of everything before the last batch. With
        0 the running statistics never move.

    What you see:
        Training is fine, since it does not use running statistics. Validation jumps from epoch to
        epoch as if it ran on single batches (momentum near 1), or is as bad as before training
        (momentum 0).

    Example:
        A layer ported from Keras, where it has ``momentum=0.99``::

            # Fault
            layer = torch.nn.BatchNorm2d(channels, momentum=0.99)
            # Fix: 1 - the value of Keras
            layer = torch.nn.BatchNorm2d(channels, momentum=0.01)

    Fix:
        Use PyTorch's convention, and recalibrate networks that are already trained. Training itself
        does not change.

    What it does not mean:
        A small momentum such as 0.001 is not out of range; BN303 says if the run is too short for
        it. A layer that is in eval mode for the whole training does not use momentum, and is not
        judged. Momentum 1 in training is ``info`` until evaluation in eval mode shows harm:
        few-shot learners use it on purpose. Momentum 0 next to estimated or loaded statistics is
        ``info`` before any training.

    Evidence:
        ``momentum`` of a layer that updates its statistics. A checkpoint does not hold it.

    Limits:
        max_momentum: 0.5, beyond which the last batch alone has most of the weight. PyTorch's
            default is 0.1, published models use 0.001 to 0.3, and PointNet and VoteNet begin with
            0.5, which falls during training.
        min_momentum: 1e-12, the smallest that has any effect.

    References:
        torch.nn.BatchNorm2d, the note on ``momentum``.
        Ioffe & Szegedy, "Batch Normalization" (2015), section 3.1, arXiv:1502.03167.
        kazuto1011/deeplab-pytorch#79, pytorch/vision#8250 and r9y9/tacotron_pytorch#19, copied
            values.
        Cadene/pretrained-models.pytorch#5, momentum 0 in pretrained layers.
        torch-points3d/torch-points3d#524, a momentum that falls; tristandeleu/pytorch-maml#5,
            momentum 1.
    """

    code: ClassVar[str] = "BN103"
    name: ClassVar[str] = "momentum-out-of-range"
    is_static: ClassVar[bool] = True
    explains: ClassVar[tuple[str, ...]] = ("BN303", "BN301", "BN302", "BN403")
    acts_by_statistics: ClassVar[bool] = True

    max_momentum: float = 0.5
    min_momentum: float = 1e-12

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare momentum with both limits."""
        momentum = layer.momentum
        if not layer.is_momentum_known:
            yield self.skip(layer, "a checkpoint does not hold momentum")
            return
        if momentum is None or layer.running is None or not layer.is_updating:
            return
        if layer.run.steps and not layer.training and not layer.calls.in_training:
            return
        if momentum < self.min_momentum:
            is_initial = layer.running.is_initial
            is_in_use = bool(layer.run.steps or layer.evaluated)
            severity = Severity.WARNING if is_in_use else Severity.INFO
            yield self.make_finding(
                layer,
                Severity.ERROR if is_initial else severity,
                "momentum is 0, so the running statistics never change"
                + (": eval mode uses mean 0 and variance 1" if is_initial else ""),
                Evidence("momentum", momentum, self.min_momentum, is_minimum=True),
                Fix("use momentum=0.1, or eval() for layers whose statistics should not change"),
            )
        elif momentum > self.max_momentum:
            yield self.make_finding(
                layer,
                Severity.INFO if _is_meant(layer, momentum) else Severity.WARNING,
                f"momentum {momentum:g} is the weight of the newest batch: the running statistics "
                "forget all but the last few batches",
                Evidence("momentum", momentum, self.max_momentum),
                Fix(
                    f"use momentum={self._propose(momentum):.2g}, then recalibrate",
                    "recalibrate",
                ),
            )

    def _propose(self, momentum: float) -> float:
        """Return what Keras means by this momentum, or the default if that is too large too."""
        converted = max(1.0 - momentum, 0.001)
        return converted if converted < self.max_momentum else DEFAULT_MOMENTUM


def _is_meant(layer: LayerHistory, momentum: float) -> bool:
    """Return whether only the newest batch is to count, and that has done no harm.

    No other framework has a 1 that could be copied; few-shot learning uses it.
    """
    if momentum != 1.0 or not layer.run.steps:
        return False
    if layer.run.mode_gap is None:
        return layer.evaluated is None or fits(layer)
    return is_known_cause_harmless(layer.run)
