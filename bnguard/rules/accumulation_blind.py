"""BN107 accumulation-blind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class AccumulationBlind(Rule):
    """Gradients are accumulated over small batches, which BN still normalises one by one.

    Why it matters:
        Accumulating over eight batches of 4 gives the optimizer the gradient of 32 samples, but
        each BN layer only ever sees 4. The noise of small batches stays, and the run is not the
        one with a batch of 32 that it was meant to imitate.

    Evidence:
        Samples a call, where the trainer accumulates, or where a layer is called in several
        forwards before each step; not in networks that train against each other, where a
        discriminator is called several times.

    Limits:
        min_samples: 8, as in BN106.
        min_accumulated_batches: 2.

    Fix:
        Enlarge the batch itself as far as memory goes (activation checkpointing, autocast), or
        use a norm that needs no batch; unlabelled batches teach the swapped network what the old
        one knew, and fine-tuned at batch 2 a classifier did better than with BN (BN202)::

            swapped = bnguard.swap(model, to="group", teacher_data=train_loader).model

    Which norm:
        GroupNorm below some 16 samples a call. BN202 has the figures of BN, GroupNorm and batch
        renormalisation (Wu & He, table 2).

    Fix safety:
        Another norm changes the network, and a swap without ``teacher_data`` most of what it
        knew: let it learn, then measure it.

    References:
        Wu & He, "Group Normalization" (2018), table 2, error against batch size.
        Goyal et al., "Accurate, Large Minibatch SGD" (2017), section 2.3, on the batch of BN.
    """

    code: ClassVar[str] = "BN107"
    name: ClassVar[str] = "accumulation-blind"
    explains: ClassVar[tuple[str, ...]] = ("BN201", "BN202", "BN301", "BN302")

    min_samples: int = 8
    min_accumulated_batches: float = 2.0

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Hold the samples a call against the limit where gradients are accumulated."""
        if layer.samples is None or not layer.run.steps:
            yield self._skipped(layer, "no batch has reached the layer in train mode yet")
            return
        accumulated = max(layer.run.plan.accumulated_batches, round(_forwards_a_step(layer), 2))
        if accumulated < self.min_accumulated_batches or layer.samples >= self.min_samples:
            return
        yield self._finding(
            layer,
            Severity.WARNING,
            f"gradients of {accumulated:g} batches are accumulated, but each is normalised by "
            f"its own {layer.samples} sample{'' if layer.samples == 1 else 's'}",
            Evidence("samples a batch", layer.samples, self.min_samples, is_minimum=True),
            Fix("enlarge the batch itself, or use GroupNorm, which needs none"),
        )


def _forwards_a_step(layer: LayerHistory) -> float:
    """Return how many forwards of the model with gradients came before each step."""
    calls = layer.calls
    if calls.most_per_forward > 1 or calls.outside or calls.without_grad:
        return 1.0
    # A discriminator is called for real and for generated images.
    if layer.run.is_adversarial:
        return 1.0
    return layer.calls.in_training / layer.run.steps
