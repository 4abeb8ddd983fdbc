"""BN108 lost-activation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class LostActivation(Rule):
    """A layer has lost the activation that belongs to it: a conversion has dropped it.

    Why it matters:
        Some BN classes end in an activation of their own (timm's ``BatchNormAct2d``).
        ``SyncBatchNorm.convert_sync_batchnorm`` replaces each by a plain ``SyncBatchNorm`` and
        hangs the children on it, where nothing calls them. The network computes another function,
        without any warning: pretrained weights give noise, new ones train badly.

    Evidence:
        Child modules of a layer whose class is PyTorch's own, which calls no children.
        ``Identity`` does not count. Or a plain layer where the layers at the same place of other
        blocks, in class and name, end in an activation: a function of one's own replaced some of
        them. Where it replaced all, nothing shows it.

    Limits:
        max_idle_children: 0.

    Fix:
        Convert with the library that the class is from::

            model = timm.layers.convert_sync_batchnorm(model)

        or put the activation after the layer: ``Sequential(layer, activation)``.

    Fix safety:
        Safe: it restores the network that was meant. One trained without its activations has to
        be trained again.

    References:
        PyTorch issue 187298, "convert_sync_batchnorm silently drops the activation / extra
            behavior of _BatchNorm subclasses".
        timm issue 1254, "Broken SyncBatchNorm due to BatchNormAct2d".
    """

    code: ClassVar[str] = "BN108"
    name: ClassVar[str] = "lost-activation"
    is_static: ClassVar[bool] = True

    max_idle_children: int = 0

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Count the children that nothing calls."""
        if layer.missing_tail:
            yield self._replaced(layer)
        if len(layer.idle_children) <= self.max_idle_children:
            return
        names = ", ".join(layer.idle_children)
        yield self._finding(
            layer,
            Severity.ERROR,
            f"{names} inside the layer is never called: a conversion to {layer.kind} dropped it",
            Evidence("idle children", len(layer.idle_children), self.max_idle_children),
            Fix("convert with the class's own library, as timm.layers.convert_sync_batchnorm"),
        )

    def _replaced(self, layer: LayerHistory) -> Finding:
        names = ", ".join(layer.missing_tail)
        return self._finding(
            layer,
            Severity.WARNING,
            f"a plain {layer.kind} where the same layer of other blocks ends in {names}: what "
            "replaced it dropped that",
            Evidence("modules missing after BN", len(layer.missing_tail), self.max_idle_children),
            Fix(f"put Sequential(layer, {layer.missing_tail[-1]}()) in its place"),
        )
