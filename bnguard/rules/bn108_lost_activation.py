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
    """A conversion dropped the activation that belongs to a layer.

    Why it matters:
        Some BN classes end in an activation of their own (timm's ``BatchNormAct2d``).
        ``SyncBatchNorm.convert_sync_batchnorm`` replaces them by a plain ``SyncBatchNorm`` and
        attaches the children, which nothing calls. The network computes another function, without a
        warning.

    What you see:
        A pretrained network gives noise right after the conversion; a new one trains badly on
        several devices, and well on one.

    Example:
        A network of timm on several devices::

            # Fault
            converted = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
            # Fix: convert with the library that the class is from
            converted = timm.layers.convert_sync_batchnorm(model)

    Fix:
        Convert with the class's own library, or put the activation after the layer:
        ``Sequential(layer, activation)``. That restores the intended network; one that was trained
        without its activations has to be trained again.

    What it does not mean:
        A BN layer without an activation is not a fault. Only a child that nothing calls is, or a
        plain layer in one block where the same layer of other blocks ends in an activation. If a
        conversion replaced all of them, nothing shows it.

    Evidence:
        Child modules, except ``Identity``, of a layer whose class is PyTorch's own and calls no
        children; and layers at the same place of other blocks, by class and name.

    Limits:
        max_idle_children: 0.

    References:
        pytorch/pytorch#187298, "convert_sync_batchnorm silently drops the activation / extra
            behavior of _BatchNorm subclasses".
        huggingface/pytorch-image-models#1254, "Broken SyncBatchNorm due to BatchNormAct2d".
    """

    code: ClassVar[str] = "BN108"
    name: ClassVar[str] = "lost-activation"
    is_static: ClassVar[bool] = True

    max_idle_children: int = 0

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Count the children that nothing calls."""
        if layer.missing_tail:
            yield self._describe_replacement(layer)
        if len(layer.idle_children) <= self.max_idle_children:
            return
        names = ", ".join(layer.idle_children)
        yield self.make_finding(
            layer,
            Severity.ERROR,
            f"nothing calls {names} in the layer: a conversion to {layer.kind} dropped it",
            Evidence("idle children", len(layer.idle_children), self.max_idle_children),
            Fix("convert with the class's own library (timm.layers.convert_sync_batchnorm)"),
        )

    def _describe_replacement(self, layer: LayerHistory) -> Finding:
        names = ", ".join(layer.missing_tail)
        return self.make_finding(
            layer,
            Severity.WARNING,
            f"the layer is a plain {layer.kind}, but the same layer of other blocks ends in "
            f"{names}: its replacement dropped that",
            Evidence("modules missing after BN", len(layer.missing_tail), self.max_idle_children),
            Fix(f"replace it with Sequential(layer, {layer.missing_tail[-1]}())"),
        )
