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
        ``model.train()`` at the start of an epoch, or after validation, puts *every* module in
        train mode, also the BN layers that were frozen with ``eval()`` before. From the second
        epoch on the statistics move, silently.

    Evidence:
        Batches of training, the model in train mode, that reached the layer in eval mode before
        its first one in train mode. Or a layer that was in eval mode when watching began, unlike
        the convolutions or linear layers next to it, and that trains in train mode. Layers that go
        back and forth, and those whose parameters were unfrozen at the same time, are meant to.

    Limits:
        min_frozen_calls: 2, before which nothing was frozen on purpose.

    Fix:
        Freeze where the mode is set, so that no call can undo it::

            class Net(nn.Module):
                def train(self, mode: bool = True):
                    super().train(mode)
                    self.backbone.eval()
                    return self

    Fix safety:
        Safe. Statistics that have moved already are put back by loading the original weights.

    References:
        torch.nn.Module.train, which sets the mode of all its children.
        PyTorch issue 10856, "Upgrade BatchNorm.cpp so the stats could be frozen (sharing bn)".
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
                yield self._finding(
                    layer,
                    Severity.WARNING,
                    f"after {calls.frozen} batches in eval mode the layer is in train mode again, "
                    "and its statistics move: a model.train() undid the freezing",
                    Evidence("batches in eval mode before", calls.frozen, self.min_frozen_calls),
                    _FREEZE,
                    step=calls.unfrozen_step,
                )
        elif layer.is_held_at_start and calls.in_training and not calls.frozen:
            yield self._finding(
                layer,
                Severity.WARNING,
                "the layer was in eval mode when watching began, unlike the modules next to it, "
                "and trains in train mode: a model.train() undid the freezing",
                Evidence("batches in train mode", calls.in_training, 0),
                _FREEZE,
            )


_FREEZE = Fix("call .eval() on the frozen layers after every model.train(), in Module.train")
