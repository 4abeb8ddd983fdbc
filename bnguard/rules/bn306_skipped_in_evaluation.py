"""BN306 skipped-in-evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class SkippedInEvaluation(Rule):
    """A layer normalises in training, and evaluation leaves it out.

    Why it matters:
        What follows the layer has learned with inputs of mean beta and standard deviation gamma. In
        evaluation it gets them as they come. Nothing is called in eval mode, so no statistics look
        wrong.

    What you see:
        Training is fine, and evaluation is bad from the first epoch on, at any batch size or at
        batch size 1 alone.

    Example:
        A layer inside a condition::

            # Fault: eval mode does not need a batch to normalise with
            def fault(images):
                return images if len(images) == 1 else layer(images)
            # Fix: leave the mode to the layer
            def fixed(images):
                return layer(images)

    Fix:
        Call the layer in both modes, and the model in eval mode, where a batch of one has the same
        output as in any other batch. The running statistics were updated all the time: nothing has
        to be trained again.

    What it does not mean:
        A head that training alone calls, as an auxiliary classifier or a projector, is not meant:
        evaluation does not call the module that holds the layer. Nor is one of several layers to
        choose from, as one per domain, if another one of them is called. A block that folds its
        layer into a convolution in eval mode has the same outputs as with the layer, and is fine.

    Evidence:
        Forwards in evaluation of the module that holds the layer, in eval mode, in which no BN
        layer inside it was called; only if none of them was ever called in eval mode or without
        gradients, while training calls them. For the first of those forwards, a copy of the module
        runs on the same inputs as training runs it, but with its BN layers in eval mode: how far
        the outputs are from that. ``info`` if the copy does not call the layers either.

    Limits:
        max_change: 0.1 standard deviations of the outputs. Folding changes them by rounding alone,
            up to 0.01 in half precision; leaving a layer out changes them by 0.7 and more in the
            zoo.

    References:
        ludwig-ai/ludwig#2299, a layer skipped for single rows; DingXiaoH/RepVGG#9, layers folded
            into convolutions.
        torch.nn.Module.eval.
    """

    code: ClassVar[str] = "BN306"
    name: ClassVar[str] = "skipped-in-evaluation"
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")

    max_change: float = 0.1

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare what leaving the layer out changes with the limit."""
        calls, change = layer.calls, layer.calls.change_left_out
        if calls.is_in_eval_mode or not calls.left_out:
            return
        forwards = Evidence("forwards of evaluation without it", calls.left_out, 0)
        message = "training normalises with the layer, and evaluation does not call it"
        fix = Fix("call the layer in eval mode too: its running statistics need no batch")
        if change is None:
            message += "; fine if it is folded into a convolution there"
            yield self.make_finding(layer, Severity.INFO, message, forwards, fix)
        elif not change <= self.max_change:
            evidence = Evidence("change of the outputs without it", change, self.max_change, "σ")
            yield self.make_finding(
                layer, Severity.WARNING, message, evidence, fix, reasons=(forwards,)
            )
