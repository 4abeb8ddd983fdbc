"""BN208 unfrozen-by-train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class UnfrozenByTrain(Rule):
    """A layer that was held in eval mode is back in train mode.

    Why it matters:
        ``model.train()``, at the start of an epoch or after validation, puts *every* module in
        train mode, also BN layers that were frozen with ``eval()`` before. From then on their
        statistics move.

    What you see:
        Fine-tuning starts well. From the second epoch, or after the first validation, the score
        drops.

    Example:
        A backbone frozen once::

            # Fault: the next model.train() undoes it
            backbone.eval()
            model.train()
            # Fix: freeze where the mode is set
            class Net(nn.Module):
                def train(self, mode: bool = True):
                    super().train(mode)
                    self.backbone.eval()
                    return self

    Fix:
        Override ``train``, or call ``.eval()`` on the frozen layers after each ``model.train()``.
        Loading the original weights restores statistics that have already moved.

    What it does not mean:
        Layers that go back and forth, and layers whose gamma and beta were unfrozen at the same
        time, are meant to train.

    Evidence:
        Batches of training that reached the layer in eval mode, with the model in train mode,
        before its first batch in train mode. Or a layer that was in eval mode when watching began,
        unlike the convolutions or linear layers next to it, and that trains in train mode.

    Limits:
        min_frozen_calls: 2; with fewer, nothing was frozen on purpose.

    References:
        torch.nn.Module.train, which sets the mode of all children.
        pytorch/pytorch#10856, "Upgrade BatchNorm.cpp so the stats could be frozen (sharing bn)".
        poppinace/indexnet_matting#35, a freeze_bn() before train().
        ContinualAI/avalanche#772, a periodic evaluation that sets train mode.
    """

    code: ClassVar[str] = "BN208"
    name: ClassVar[str] = "unfrozen-by-train"
    explains: ClassVar[tuple[str, ...]] = ("BN101", "BN201", "BN202", "BN203", "BN301", "BN302")
    acts_by_statistics: ClassVar[bool] = True

    min_frozen_calls: int = 2

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Look for eval mode before the first call in train mode, and for none after it."""
        calls = layer.calls
        if layer.is_affine_frozen_at_start and not layer.is_affine_frozen:
            return
        if calls.unfrozen_step is not None and not calls.frozen_after:
            if calls.frozen >= self.min_frozen_calls:
                yield self.make_finding(
                    layer,
                    Severity.WARNING,
                    f"after {calls.frozen} batches in eval mode the layer is in train mode again, "
                    "and its statistics move: a model.train() undid the freezing",
                    Evidence("batches in eval mode before", calls.frozen, self.min_frozen_calls),
                    _FREEZE,
                    step=calls.unfrozen_step,
                )
        elif layer.is_held_at_start and calls.in_training and not calls.frozen:
            yield self.make_finding(
                layer,
                Severity.WARNING,
                "the layer was in eval mode when watching began, unlike the modules next to it, "
                "and trains in train mode: a model.train() undid the freezing",
                Evidence("batches in train mode", calls.in_training, 0),
                _FREEZE,
            )


_FREEZE = Fix("call .eval() on the frozen layers after every model.train(), in Module.train")
