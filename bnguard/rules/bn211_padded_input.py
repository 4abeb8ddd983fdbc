"""BN211 padded-input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import History, LayerHistory
from bnguard.rules.base import ModelRule


@dataclass(frozen=True, kw_only=True)
class PaddedInput(ModelRule):
    """A large and varying part of what BN normalises is padding.

    Why it matters:
        BN counts padded positions as data. They pull the mean to the padding value and shrink the
        variance, more so the more padding a batch holds: a sequence is normalised differently next
        to a long one than next to a short one.

    What you see:
        Predictions for a sequence change with the batch that it is in. Evaluation with other
        lengths, or one by one, is worse.

    Example:
        Sequences (N, C, L), padded to the longest::

            # Fault
            outputs = batch_norm(features)
            # Fix: only the valid positions, (valid positions, C)
            valid = mask.bool()
            outputs = torch.zeros(valid.shape + features.shape[1:2])
            outputs[valid] = batch_norm(features.transpose(1, 2)[valid])

    Fix:
        Normalise the valid positions only, put samples of similar length into a batch, or use
        LayerNorm over the channels. Masking changes the statistics: train on or recalibrate
        afterwards.

    What it does not mean:
        A constant share of padding, or a constant background, is the same in both modes and does no
        harm. A harmless mode gap (BN302) does not disprove it: both modes see the same padding.

    Evidence:
        The share of a sample's positions that belong to a constant tail, minus the constant head
        that a background has too: mean and standard deviation over the samples of the newest
        evaluation.

    Limits:
        max_padding_share: 0.2. Healthy runs of the zoo, with dark backgrounds and repeated tokens
            among them, stay below 0.01; padded sequences of 6 to 32 steps have 0.36 to 0.45.
        max_padding_spread: 0.1 from sample to sample.

    References:
        pytorch/pytorch#70529, "BatchNorm on variable-length sequences or batches".
        SeanNaren/deepspeech.pytorch#312, padding in batches of utterances.
    """

    code: ClassVar[str] = "BN211"
    name: ClassVar[str] = "padded-input"
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")

    max_padding_share: float = 0.2
    max_padding_spread: float = 0.1

    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Compare the share of padding, and how it varies, with the limits."""
        for layer in history.layers:
            if layer.evaluated is None:
                yield self.skip(layer, "the layer was not seen in eval mode")
        seen = [layer for layer in history.layers_in_order if layer.evaluated is not None]
        for place, layer in enumerate(seen):
            next_to_it = seen[max(0, place - 1) : place + 2]
            if place == 0 or sum(map(self._has_padding, next_to_it)) > 1:
                yield from self._judge(layer)

    def _has_padding(self, layer: LayerHistory) -> bool:
        seen = layer.evaluated
        return seen is not None and seen.padding_share > self.max_padding_share / 2

    def _judge(self, layer: LayerHistory) -> Iterator[Finding]:
        assert layer.evaluated is not None
        share, spread = layer.evaluated.padding_share, layer.evaluated.padding_spread
        if not (share > self.max_padding_share and spread > self.max_padding_spread):
            return
        yield self.make_finding(
            layer,
            Severity.WARNING,
            f"{share:.0%} of the positions are padding, ±{spread:.0%} from sample to sample: the "
            "statistics depend on the lengths in a batch",
            Evidence("share of padding", 100 * share, 100 * self.max_padding_share, "%"),
            Fix("normalise only the valid positions, or batch samples of similar length"),
            step=layer.evaluated.step,
        )
