"""BN103 momentum-out-of-range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.layers.distances import DEFAULT_MOMENTUM
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class MomentumOutOfRange(Rule):
    """Momentum keeps only the last batches, or keeps nothing of any batch.

    Why it matters:
        PyTorch's ``momentum`` is the weight of the *new* batch; in Keras and TensorFlow it is
        that of the old average. A 0.99 that was taken over from there keeps 1 % of everything
        before the last batch: evaluation is then as noisy as a single batch. With 0 the running
        statistics never move, and eval mode uses what they were at the start.

    Evidence:
        ``momentum`` of a layer that updates its statistics. A layer in eval mode throughout the
        training does not use it, and is not judged; a checkpoint does not hold it. A momentum of 0
        next to statistics that were estimated or loaded is ``info`` before any training.

    Limits:
        max_momentum: 0.5, at which the last batch alone has half of all the weight; PyTorch's
            default is 0.1, and published models lie between 0.001 and 0.3.
        min_momentum: 1e-12, the smallest that updates at all; what is too small for the length of
            the training is BN303's to say.

    Fix:
        Say it in PyTorch's convention, 1 - the Keras value::

            torch.nn.BatchNorm2d(channels, momentum=0.01)    # Keras: momentum=0.99

        and estimate the statistics of a trained network again::

            bnguard.recalibrate(model, train_loader)

    Fix safety:
        Safe: training uses the statistics of each batch, and does not change.

    References:
        torch.nn.BatchNorm2d, the note that ``momentum`` is not the conventional one.
        Ioffe & Szegedy, "Batch Normalization" (2015), section 3.1, on inference.
    """

    code: ClassVar[str] = "BN103"
    name: ClassVar[str] = "momentum-out-of-range"
    is_static: ClassVar[bool] = True
    explains: ClassVar[tuple[str, ...]] = ("BN303", "BN301", "BN302", "BN403")
    acts_by_statistics: ClassVar[bool] = True

    max_momentum: float = 0.5
    min_momentum: float = 1e-12

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Hold momentum against both limits."""
        momentum = layer.momentum
        if not layer.is_momentum_known:
            yield self._skipped(layer, "a checkpoint does not hold momentum")
            return
        if momentum is None or layer.running is None or not layer.is_updating:
            return
        if layer.run.steps and not layer.training and not layer.calls.in_training:
            return
        if momentum < self.min_momentum:
            is_initial = layer.running.is_initial
            is_in_use = bool(layer.run.steps or layer.evaluated)
            severity = Severity.WARNING if is_in_use else Severity.INFO
            yield self._finding(
                layer,
                Severity.ERROR if is_initial else severity,
                "momentum is 0, so that the running statistics never move"
                + (": eval mode uses mean 0 and variance 1" if is_initial else ""),
                Evidence("momentum", momentum, self.min_momentum, is_minimum=True),
                Fix("momentum=0.1, or eval() on layers whose statistics should stay"),
            )
        elif momentum >= self.max_momentum:
            yield self._finding(
                layer,
                Severity.WARNING,
                f"momentum {momentum:g} is the weight of the newest batch: what came before the "
                "last few is forgotten",
                Evidence("momentum", momentum, self.max_momentum),
                Fix(f"momentum={self._proposed(momentum):.2g}, then recalibrate", "recalibrate"),
            )

    def _proposed(self, momentum: float) -> float:
        """Return what Keras means by this momentum, or the default where that is too large too."""
        converted = max(1.0 - momentum, 0.001)
        return converted if converted < self.max_momentum else DEFAULT_MOMENTUM
