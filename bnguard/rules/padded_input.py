"""BN211 padded-input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class PaddedInput(Rule):
    """A large and varying part of what is normalised is padding.

    Why it matters:
        BN counts padded positions as data. The mean is drawn to the padding value and the
        variance shrinks, the more, the more padding a batch happens to hold: a sequence is
        normalised differently next to a long one than next to a short one, and evaluation with
        other lengths meets other statistics.

    Evidence:
        The share of a sample's positions that belong to a constant tail, less the constant head
        that a background has as well: the mean over the samples of the newest evaluation, and its
        standard deviation over the samples. A constant share is the same in both modes and does no
        harm. A harmless mode gap does not lower it: the same batch, padding and all, goes through
        both modes.

    Limits:
        max_padding_share: 0.2. Healthy runs of the zoo, dark backgrounds and repeated
            tokens among them, stay below 0.01; padded sequences of 6 to 32 steps have 0.35.
        max_padding_spread: 0.1.

    Fix:
        Normalise the valid positions alone::

            valid = mask.bool()                                # (N, L)
            flat = features.transpose(1, 2)[valid]             # (valid positions, C)
            features.transpose(1, 2)[valid] = batch_norm(flat)

        or sort samples of like length into a batch, or use LayerNorm over the channels.

    Fix safety:
        Masking changes the statistics: train on, or recalibrate, afterwards.

    References:
        PyTorch issue 70529, "BatchNorm on variable-length sequences or batches".
    """

    code: ClassVar[str] = "BN211"
    name: ClassVar[str] = "padded-input"
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")

    max_padding_share: float = 0.2
    max_padding_spread: float = 0.1

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Hold the share of padding, and how it varies, against the limits."""
        if layer.evaluated is None:
            yield self._skipped(layer, "the layer was not seen in eval mode")
            return
        share, spread = layer.evaluated.padding_share, layer.evaluated.padding_spread
        if not (share > self.max_padding_share and spread > self.max_padding_spread):
            return
        yield self._finding(
            layer,
            Severity.WARNING,
            f"{share:.0%} of the positions are padding, ±{spread:.0%} from sample to sample: the "
            "statistics depend on the lengths in a batch",
            Evidence("share of padding", 100 * share, 100 * self.max_padding_share, "%"),
            Fix("normalise the valid positions alone, or batch samples of like length"),
            step=layer.evaluated.step,
        )
