"""BN206 update-outside-training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import LOGARITHM, Evidence, Finding, Fix, Severity, Skipped, counted
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule
from bnguard.rules.bn207_several_streams import distances
from bnguard.rules.measurements import distance_of, fits


@dataclass(frozen=True, kw_only=True)
class UpdateOutsideTraining(Rule):
    """Batches that are not trained on enter the running statistics.

    Why it matters:
        ``torch.no_grad()`` stops gradients, not BN. A validation without ``model.eval()``
        normalises with its own batches, so its score is not that of the network as it will be used,
        and its data leak into the running statistics. A dummy forward (a summary, a profile) leaves
        its zeros there.

    What you see:
        Validation looks good, and deployment, where the mode is right, is worse. Or predictions
        change after a forward that should not have changed anything.

    Example:
        A validation without ``eval()``::

            # Fault
            model.train()
            with torch.no_grad():
                outputs = model(batch)
            # Fix: set the mode, and set it back
            model.eval()
            with torch.no_grad():
                outputs = model(batch)
            model.train()

    Fix:
        Set mode and gradients, both. The validation score changes, since it was another network's.
        Monte Carlo dropout needs only the dropout layers in train mode::

            model.eval()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.train()

    What it does not mean:
        Re-estimating statistics on purpose is fine: ``bnguard.recalibrate`` and
        ``torch.optim.swa_utils.update_bn`` do not count, other passes after training are ``info``.
        Nor do networks that run under ``no_grad`` in every step count (a teacher, a generator while
        the discriminator learns). Few-shot learners that test with the batches of an episode are
        ``info``: with momentum 1, or with adapted weights of which none was run in eval mode.

    Evidence:
        Calls with batch statistics inside ``monitor.evaluation()`` or Lightning's validation.
        Outside of it, calls under ``no_grad`` between two training steps, if none was in eval mode.
        Other calls under ``no_grad``, in a small part of the steps or after the last, are ``info``;
        they are a ``warning``, in every step too, if they differ from the batches of training and
        evaluation does not match the running statistics. Dummy forwards of a network that was not
        trained while it was watched are judged the same way.

    Limits:
        max_calls_in_evaluation: 0.
        max_calls_without_grad: 1 call under ``no_grad`` outside of the usual.
        max_share_of_steps: 0.5 of the steps, beyond which such calls are the usual.
        max_distance_std: 1 standard deviation between their batches and those of training, as in
            BN207.
        max_log_variance_ratio: 1, the same for the variances.
        min_batches: 4 batches under ``no_grad`` before they are compared.

    References:
        torch.nn.Module.eval, and the note on it in "Autograd mechanics".
        pytorch/pytorch#5406, "BatchNorm behaves different in train() and eval()".
        pytorch/vision#2079, a forward in train mode between two evaluations.
        layumi/Person_reID_baseline_pytorch#218, inference without eval().
        google-research/seed_rl#28, an actor in train mode; lightning-uq-box/lightning-uq-box#173,
            Monte Carlo dropout; learnables/learn2learn#207, a meta-learner.
    """

    code: ClassVar[str] = "BN206"
    name: ClassVar[str] = "update-outside-training"
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")
    acts_by_statistics: ClassVar[bool] = True

    max_calls_in_evaluation: int = 0
    max_calls_without_grad: int = 1
    max_share_of_steps: float = 0.5
    max_distance_std: float = 1.0
    max_log_variance_ratio: float = 1.0
    min_batches: int = 4

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Count the calls with batch statistics outside of training."""
        if layer.running is None or not layer.is_updating:
            return
        calls = layer.calls
        # Few-shot learners test with the batches of an episode on purpose.
        is_meant = calls.are_of_meta_learner or layer.momentum == 1.0
        severity = Severity.INFO if is_meant else Severity.WARNING
        number = Evidence("batches under no_grad", calls.without_grad, self.max_calls_without_grad)
        # The end of an evaluation shows only once a network with gradients runs: after a teacher.
        if calls.in_evaluation > self.max_calls_in_evaluation and not calls.are_without_grad:
            yield self.make_finding(
                layer,
                severity,
                "the layer was in train mode during evaluation: "
                f"{counted(calls.in_evaluation, 'batch', 'batches')} of it entered the running "
                "statistics",
                Evidence(
                    "batches of evaluation in the statistics",
                    calls.in_evaluation,
                    self.max_calls_in_evaluation,
                ),
                _EVAL,
            )
        elif (other := self._of_other_data(layer)) is not None:
            yield self.make_finding(
                layer,
                severity,
                f"{_when(layer)}: a missing eval(), since they differ from the training batches",
                other,
                _EVAL,
                reasons=(number,),
            )
        elif self._was_moved_without_training(layer):
            yield self.make_finding(
                layer,
                severity,
                f"{calls.without_grad} batches entered the running statistics under no_grad, "
                "without a training step, and evaluation does not match them: dummy forwards, or "
                "a missing eval()",
                number,
                _EVAL,
            )
        elif self._is_unusual(layer) and calls.between_steps > self.max_calls_without_grad:
            yield self.make_finding(
                layer,
                severity,
                f"{calls.between_steps} batches entered the running statistics under no_grad, "
                f"before {calls.steps_with_some_between} of {layer.run.steps} steps, and none "
                "in eval mode: an evaluation without eval()",
                dataclasses.replace(number, value=calls.between_steps),
                _EVAL,
            )
        elif self._is_unusual(layer):
            yield self.make_finding(
                layer,
                Severity.INFO,
                f"{_when(layer)}: re-estimation, or a missing eval()",
                number,
                _EVAL,
            )

    def _of_other_data(self, layer: LayerHistory) -> Evidence | None:
        """Return how far batches under ``no_grad`` are from training; None if without harm."""
        other = layer.without_grad
        if other is None or other.batches < self.min_batches or layer.evaluated is None:
            return None
        if not layer.streams or fits(layer):
            return None
        distance, ratio = distances((layer.streams[0], other))
        by_mean = Evidence("distance from training", distance, self.max_distance_std, "σ")
        by_var = Evidence(
            "variance against training off by", ratio, self.max_log_variance_ratio, LOGARITHM
        )
        worst = max(by_mean, by_var, key=lambda evidence: evidence.value / evidence.limit)
        return worst if worst.value > worst.limit else None

    def _was_moved_without_training(self, layer: LayerHistory) -> bool:
        if layer.run.steps or not layer.calls.are_without_grad:
            return False
        distance = distance_of(layer)
        has_some = layer.calls.without_grad > self.max_calls_without_grad
        return has_some and distance is not None and distance.is_beyond

    def _is_unusual(self, layer: LayerHistory) -> bool:
        """Return whether some calls ran under ``no_grad``, and most of the steps had none."""
        with_grad = layer.calls.in_training - layer.calls.without_grad
        is_usual = layer.calls.steps_without_grad > self.max_share_of_steps * layer.run.steps
        has_some = layer.calls.without_grad > self.max_calls_without_grad
        return has_some and bool(with_grad) and not is_usual


def _when(layer: LayerHistory) -> str:
    """Return, in words, how many batches entered the statistics under ``no_grad``, and when."""
    calls = layer.calls
    # The calls after the last step count as a step.
    after = calls.since_training
    steps = calls.steps_without_grad - bool(after)
    when = f"in {steps} of {layer.run.steps} steps" if steps else "all after the last step"
    if steps and after:
        when += f" and {after} of them after the last"
    return f"{calls.without_grad} batches entered the running statistics under no_grad, {when}"


_EVAL = Fix(
    "call model.eval() before evaluation and other forwards without training, model.train() after "
    "them; for MC dropout, put only the dropout layers in train mode"
)
