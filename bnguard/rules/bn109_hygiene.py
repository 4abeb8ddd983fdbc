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
    """Weight decay on gamma, dropout before BN or a bias before BN wastes something.

    Why it matters:
        None of these breaks a run. Weight decay on gamma and beta regularises nothing that the next
        layer could not undo, and pulls gamma to zero. Dropout right before BN makes the variance in
        training larger than in evaluation. BN subtracts a bias right before it together with the
        mean.

    What you see:
        Usually nothing. With dropout before BN, validation is somewhat worse than the training loss
        suggests.

    Example:
        An optimizer that decays everything::

            # Fault
            optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
            # Fix: no decay on gamma, beta and biases
            matrices = [p for p in model.parameters() if p.ndim > 1]
            vectors = [p for p in model.parameters() if p.ndim <= 1]
            groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, weight_decay=0.01)

    Fix:
        Use two groups, put dropout after the last BN layer, and give the layer before BN
        ``bias=False``. All three are safe for new runs; a checkpoint with the bias does not load
        into a network without it.

    What it does not mean:
        It is always ``info``. A trained network does not need to change; biases are not reported
        once it trains.

    Evidence:
        The largest weight decay of the optimizer groups that hold gamma or beta, and the class and
        bias of the module before the layer in its ``Sequential``.

    Limits:
        max_weight_decay: 0.

    References:
        He et al., "Bag of Tricks for Image Classification" (2019), section 3.1, arXiv:1812.01187.
        Li et al., "Understanding the Disharmony between Dropout and Batch Normalization by Variance
            Shift" (2019), arXiv:1801.05134.
        luigibonati/mlcolvar#205, which moves dropout behind BN.
        Samyssmile/edux#209, AdamW that decays all parameters.
    """

    code: ClassVar[str] = "BN109"
    name: ClassVar[str] = "hygiene"
    is_static: ClassVar[bool] = True

    max_weight_decay: float = 0.0

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Report the worst setting only: dropout before BN, then weight decay, then a bias."""
        if layer.fed_by is not None and "Dropout" in layer.fed_by:
            yield self.make_finding(
                layer,
                Severity.INFO,
                f"{layer.fed_by} feeds the layer: the variance is larger in training than in "
                "evaluation",
                Evidence("dropout layers right before", 1, 0),
                Fix("move dropout after the last BN layer"),
            )
        elif layer.weight_decay is not None and layer.weight_decay > self.max_weight_decay:
            yield self.make_finding(
                layer,
                Severity.INFO,
                "weight decay pulls gamma and beta towards zero",
                Evidence("weight decay", layer.weight_decay, self.max_weight_decay),
                Fix("put gamma, beta and biases in an optimizer group with weight_decay=0"),
            )
        elif layer.is_bias_cancelled and not layer.run.steps:
            yield self.make_finding(
                layer,
                Severity.INFO,
                f"BN subtracts the bias of the {layer.fed_by} before it together with the mean",
                Evidence("redundant biases", 1, 0),
                Fix("use bias=False there in new networks"),
            )
