"""BN209 trained-in-eval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.layers.distances import FORGOTTEN_WEIGHT
from bnguard.observe.history import LayerHistory, Run
from bnguard.rules.base import Rule
from bnguard.rules.measurements import distance_of


@dataclass(frozen=True, kw_only=True)
class TrainedInEval(Rule):
    """The network is trained in eval mode, so BN normalises nothing.

    Why it matters:
        In eval mode a BN layer is a fixed scale and shift. With the initial statistics (0, 1) it
        does nothing at all, and a deep network without normalisation trains badly or diverges.
        Dropout is off too.

    What you see:
        Training and validation agree, and both are bad; or the loss stops falling, or diverges,
        after the first validation of an epoch.

    Example:
        A validation in the middle of an epoch::

            # Fault: the rest of the epoch trains in eval mode
            model.eval()
            validate(model)
            # Fix
            model.train()

    Fix:
        Call ``model.train()`` at the start of each epoch and after each validation. A network
        trained in eval mode uses its fixed statistics: train on after the change.

    What it does not mean:
        A layer in eval mode with trained statistics, in a model in train mode, is a choice, and
        frozen layers and copies that others write to are not judged, unless they are frozen as they
        were built. If the whole model is in eval mode from the first step on, it may be a choice
        too: ``info`` as long as the inputs of the newest evaluation match the statistics as closely
        as BN301 asks, a ``warning`` once the weights have moved away from them, or if more than 5 %
        of the statistics are still the initial ones.

    Evidence:
        Training steps that end with the whole model in eval mode, if more than half of them called
        it with gradients: their share, or how many in a row; after a validation in the middle of an
        epoch that forgets ``train()``, that is every step until the next one. Or training in eval
        mode with initial statistics. Fine-tuned in eval mode on digits, networks end within 1 point
        of those in train mode at a learning rate of 0.01, where the inputs stay within half of the
        limits of BN301; at 0.05 an MLP loses 4 to 16 points, and its inputs are beyond the limits
        up to 8 times.

    Limits:
        max_share_in_eval_mode: 0.5 of the training steps.
        max_steps_in_eval_mode: 20 in a row, as after a validation in the middle of an epoch.
        min_steps: 3 steps before they are judged.

    References:
        torch.nn.Module.eval and torch.nn.Module.train.
        Ioffe & Szegedy, "Batch Normalization" (2015), section 3.1, arXiv:1502.03167.
        pytorch/vision#5443, layers frozen without pretrained weights.
        joeynmt/joeynmt#184 and wkentaro/pytorch-fcn#56, a forgotten train() in mid-epoch.
    """

    code: ClassVar[str] = "BN209"
    name: ClassVar[str] = "trained-in-eval"
    explains: ClassVar[tuple[str, ...]] = ("BN303", "BN301", "BN302", "BN304")
    acts_by_statistics: ClassVar[bool] = True

    max_share_in_eval_mode: float = 0.5
    max_steps_in_eval_mode: int = 20
    min_steps: int = 3

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Look for layers that learn, but normalise with fixed statistics."""
        run = layer.run
        if run.steps < self.min_steps or layer.training is None:
            yield self.skip(layer, "no training was observed")
            return
        if layer.running is None or layer.training:
            return
        if layer.is_affine_frozen and not _does_nothing(layer):
            return
        is_model_in_eval = self._is_model_in_eval(run)
        if layer.calls.in_training and not is_model_in_eval:
            return
        if layer.running.is_initial and layer.calls.frozen:
            calls = Evidence("calls in eval mode", layer.calls.frozen, 0)
            if layer.is_affine_frozen:
                yield self.make_finding(
                    layer,
                    Severity.WARNING,
                    "the layer is frozen as it was built, with mean 0, variance 1, gamma 1 and "
                    "beta 0: it does nothing",
                    calls,
                    Fix("load the pretrained weights and buffers, or train the layer"),
                )
                return
            yield self.make_finding(
                layer,
                Severity.ERROR,
                "the layer trains in eval mode with the initial mean 0 and variance 1: it "
                "normalises nothing",
                calls,
                Fix("load running statistics with the weights, or leave the layer in train mode"),
            )
        elif is_model_in_eval and _is_trained(layer):
            yield self._of_model(layer)

    def _of_model(self, layer: LayerHistory) -> Finding:
        """Return the finding for a whole model in eval mode: a choice, perhaps, or a fault."""
        run, evidence = layer.run, self._evidence(layer.run)
        if run.steps_in_eval_mode < run.steps:
            return self.make_finding(
                layer,
                Severity.WARNING,
                f"the whole model was in eval mode in {run.steps_in_eval_mode} of {run.steps} "
                "training steps: BN uses fixed statistics, and dropout is off",
                evidence,
                Fix(
                    "call model.train() after each validation, also in the middle of an epoch; "
                    "until then every step is in eval mode"
                ),
            )
        fix = Fix("call model.train() at the start of every epoch, and after each validation")
        message = (
            f"the whole model was in eval mode in all {run.steps} training steps: BN uses fixed "
            "statistics, and dropout is off"
        )
        is_initial = layer.running is not None and layer.running.is_initial
        left = 1.0 if is_initial else layer.initial_weight or 0.0
        if left > FORGOTTEN_WEIGHT:
            message += f"; {left:.0%} of them are still the initial mean 0 and variance 1"
            return self.make_finding(layer, Severity.WARNING, message, evidence, fix)
        distance = distance_of(layer)
        if distance is None or distance.worst is None or not distance.is_beyond:
            message += "; fine if the network is fine-tuned like this on purpose"
            return self.make_finding(layer, Severity.INFO, message, evidence, fix)
        message += ", which the inputs of the layer no longer match"
        return self.make_finding(
            layer, Severity.WARNING, message, distance.worst, fix, reasons=(evidence,)
        )

    def _is_model_in_eval(self, run: Run) -> bool:
        return self._evidence(run).excess > 1.0

    def _evidence(self, run: Run) -> Evidence:
        share = run.steps_in_eval_mode / run.steps
        if share > self.max_share_in_eval_mode:
            return Evidence("share of steps in eval mode", share, self.max_share_in_eval_mode)
        longest, limit = run.longest_in_eval_mode, self.max_steps_in_eval_mode
        return Evidence("steps in a row in eval mode", longest, limit)


def _does_nothing(layer: LayerHistory) -> bool:
    """Return whether a layer was frozen as it was built, while the weights before it learn."""
    affine = ((layer.gamma, 1.0), (layer.beta, 0.0))
    is_initial = all(part is None or bool(np.all(part == value)) for part, value in affine)
    return is_initial and layer.has_moving_weights and not layer.is_following


def _is_trained(layer: LayerHistory) -> bool:
    """Return whether training is of this model, as far as can be seen: compiled calls cannot be."""
    if layer.position is None or layer.run.is_optimized is False:
        return layer.run.is_optimized is True
    return 2 * layer.calls.in_eval_mode_with_grad > layer.run.steps_in_eval_mode
