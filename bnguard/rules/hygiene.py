"""BN109 hygiene."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class Hygiene(Rule):
    """Settings around a layer that waste something: decayed gamma, dropout before, a vain bias.

    Why it matters:
        None of these breaks a run. Weight decay on gamma and beta regularises nothing that the
        next layer could not undo, and pulls gamma to zero. Dropout right before BN makes the
        variance in training larger than in evaluation, so that the running variance fits neither.
        A bias right before BN is subtracted with the mean again.

    Evidence:
        The largest weight decay of the optimizer groups that own gamma or beta; the class of the
        module before the layer in its ``Sequential``, and, as long as the network has
        not trained, whether it has a bias: later nobody would take it out.

    Limits:
        max_weight_decay: 0.

    Fix:
        Give the optimizer two groups, gamma, beta and the biases in the second::

            decayed = [p for p in model.parameters() if p.ndim > 1]
            others = [p for p in model.parameters() if p.ndim <= 1]
            torch.optim.AdamW([{"params": decayed}, {"params": others, "weight_decay": 0.0}])

        Put dropout after the last BN layer, and ``bias=False`` into the layer before one.

    Fix safety:
        Safe for new runs. A checkpoint with the bias does not load into a network without it.

    References:
        He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks"
            (2019), section 3.1: no bias decay.
        Li et al., "Understanding the Disharmony between Dropout and Batch Normalization by
            Variance Shift" (2019).
    """

    code: ClassVar[str] = "BN109"
    name: ClassVar[str] = "hygiene"
    is_static: ClassVar[bool] = True

    max_weight_decay: float = 0.0

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Name what is wasted; in one finding, the first that applies in order of harm."""
        if layer.fed_by is not None and "Dropout" in layer.fed_by:
            yield self._finding(
                layer,
                Severity.INFO,
                f"{layer.fed_by} feeds the layer: the variance is larger in training than in "
                "evaluation",
                Evidence("dropout layers right before", 1, 0),
                Fix("move dropout behind the last BN layer"),
            )
        elif layer.weight_decay is not None and layer.weight_decay > self.max_weight_decay:
            yield self._finding(
                layer,
                Severity.INFO,
                "weight decay pulls gamma and beta towards zero",
                Evidence("weight decay", layer.weight_decay, self.max_weight_decay),
                Fix("a group of the optimizer with weight_decay=0 for them and the biases"),
            )
        elif layer.is_bias_cancelled and not layer.run.steps:
            yield self._finding(
                layer,
                Severity.INFO,
                f"the bias of the {layer.fed_by} before is subtracted again with the mean",
                Evidence("redundant biases", 1, 0),
                Fix("bias=False there, in new networks"),
            )
