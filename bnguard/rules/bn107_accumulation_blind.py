"""BN107 accumulation-blind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped, counted
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class AccumulationBlind(Rule):
    """Gradients are accumulated over small batches, but BN normalises each of them by itself.

    Why it matters:
        Accumulating over 8 batches of 4 gives the optimizer the gradient of 32 samples, but each BN
        layer still sees 4. The run does not imitate a batch of 32.

    What you see:
        Accumulation makes the loss smoother, but not the score better. Validation stays as noisy as
        with the small batch.

    Example:
        Lightning with ``Trainer(accumulate_grad_batches=8)``, or the same by hand::

            # Fault: the gradient of 32 samples, the statistics of 4
            loader = DataLoader(dataset, batch_size=4)
            # Fix: the batch itself, or a norm that needs none
            loader = DataLoader(dataset, batch_size=32)
            swapped = bnguard.swap(model, to="group", teacher_data=train_loader).model

    Fix:
        Enlarge the batch as far as memory goes (activation checkpointing, autocast), or use
        GroupNorm below some 16 samples; BN202 says which norm for whom. A swap without
        ``teacher_data`` loses most of what the network knew: train it, and measure it.

    What it does not mean:
        Accumulation over batches of 8 and more samples is fine, and so is a discriminator that is
        called several times per step.

    Evidence:
        Samples per call, if the trainer accumulates or a layer is called in several forwards before
        each step.

    Limits:
        min_samples: 8, as in BN106.
        min_accumulated_batches: 2.

    References:
        Wu & He, "Group Normalization" (2018), table 2, arXiv:1803.08494.
        Goyal et al., "Accurate, Large Minibatch SGD" (2017), section 2.3, arXiv:1706.02677.
        ultralytics/yolov5#1630, accumulation over batches of 4.
    """

    code: ClassVar[str] = "BN107"
    name: ClassVar[str] = "accumulation-blind"
    explains: ClassVar[tuple[str, ...]] = ("BN201", "BN202", "BN301", "BN302")

    min_samples: int = 8
    min_accumulated_batches: float = 2.0

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare the samples per call with the limit, if gradients are accumulated."""
        if layer.samples is None or not layer.run.steps:
            yield self.skip(layer, "no batch has reached the layer in train mode yet")
            return
        accumulated = max(layer.run.plan.accumulated_batches, round(_forwards_a_step(layer), 2))
        if accumulated < self.min_accumulated_batches or layer.samples >= self.min_samples:
            return
        yield self.make_finding(
            layer,
            Severity.WARNING,
            f"gradients accumulate over {accumulated:,.4g} batches, but each is normalised with "
            f"its own {counted(layer.samples, 'sample')}",
            Evidence("samples per batch", layer.samples, self.min_samples, is_minimum=True),
            Fix("enlarge the batch itself, or use GroupNorm, which needs no batch"),
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
