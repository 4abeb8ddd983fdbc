"""BN305 input-shift."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Finding, Fix, Severity, Skipped, counted
from bnguard.layers.distances import log_variance_ratio, shift_std
from bnguard.observe.history import (
    BatchWindow,
    EvalWindow,
    History,
    LayerHistory,
    RunningStatistics,
)
from bnguard.rules.base import ModelRule
from bnguard.rules.measurements import (
    Distance,
    DriftLimits,
    is_known_cause_harmless,
    is_sampling,
    jump_of_network,
    left_when_evaluated,
)


@dataclass(frozen=True, kw_only=True)
class InputShift(ModelRule):
    """Evaluation data differ from training data before the first BN layer.

    Why it matters:
        Before the first BN layer only the data and a few layers can differ. A drift there comes
        from outside: another scaling or channel order, a missing normalisation, colour jitter in
        training only, another camera or domain. No momentum and no recalibration on training data
        repairs that.

    What you see:
        Validation is bad from the first epoch on and does not follow the training loss. The
        training data in eval mode are fine.

    Example:
        Preprocessing in training only::

            def prepare(images):
                return (images - 0.5) / 0.25

            # Fault
            outputs = model.train()(prepare(batch))
            outputs = model.eval()(batch)
            # Fix: one function for both
            outputs = model.eval()(prepare(batch))

    Fix:
        Print mean and standard deviation of one batch of each, and share the preprocessing. If the
        domains really differ, ``bnguard.recalibrate(model, target_loader)`` adapts the network to
        the new one, and may make it worse on the old one.

    What it does not mean:
        Noise and shifts as augmentation stay within the limits. It is ``info`` if the mode gap was
        measured and, at the end, is below 0.4 σ and 7 % flips, which harms no network. It is not
        judged if the network before the layer changes from batch to batch, as in a supernet.

    Evidence:
        At the first BN layer that training updates: inputs in eval mode against the newest batches
        of training *and* against the running statistics, as shift in standard deviations or
        log-variance ratio, the quantile over channels; the smaller of the two distances counts. If
        weights move, both lag behind them: the limits grow by the distance of the newest batches
        from the running statistics, or from each other. After dropout, a smaller variance in
        evaluation does not count.

    Limits:
        max_shift_std: 1. 95 % of the healthy runs of the zoo stay below 0.33, those with noise and
            shifts as augmentation below 0.62, the discriminator of a GAN reaches 0.94; other
            preprocessing gives 1.6 to 2.7.
        max_log_variance_ratio: 1.25, a factor of 3.5. 95 % of the healthy runs stay below 0.22,
            evaluations that are sorted by class reach 1.3.
        channel_quantile: 0.9 of the channels have to be within the limits.
        min_values: 256 values per channel in eval mode before they are judged.
        max_initial_weight: 0.05, as in BN301.

    References:
        Schneider et al., "Improving robustness against common corruptions by covariate shift
            adaptation" (2020), arXiv:2006.16971.
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm" (2021), section 5, arXiv:2105.07576.
        bearpaw/pytorch-pose#4, normalisation in training only.
        Deci-AI/super-gradients#183, other constants for the teacher; xu-ji/IIC#10, distractors.
    """

    code: ClassVar[str] = "BN305"
    name: ClassVar[str] = "input-shift"
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302", "BN403")

    max_shift_std: float = 1.0
    max_log_variance_ratio: float = 1.25
    channel_quantile: float = 0.9
    min_values: int = 256
    max_initial_weight: float = 0.05

    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Compare the inputs of the first layer in evaluation with those of training."""
        layer = history.first_trained
        if layer is None:
            return
        seen = layer.evaluated
        if seen is None or layer.window is None:
            yield self.skip(layer, "the first layer was not seen in both modes")
        elif layer.calls.are_without_grad:
            yield self.skip(layer, "no layer is trained, so there are no training data")
        elif jump_of_network(layer) is not None:
            yield self.skip(layer, "the network before it changes from batch to batch")
        elif seen.count < self.min_values:
            yield self.skip(
                layer, f"only {counted(seen.count, 'value')} per channel observed in eval mode"
            )
        elif left_when_evaluated(layer, self.max_initial_weight):
            yield self.skip(layer, "the running statistics had not settled yet")
        else:
            yield from self._judge(layer, seen)

    @property
    def _limits(self) -> DriftLimits:
        return DriftLimits(self.max_shift_std, self.max_log_variance_ratio, self.channel_quantile)

    def _judge(self, layer: LayerHistory, seen: EvalWindow) -> Iterator[Finding | Skipped]:
        window, running = layer.window, seen.running
        assert window is not None
        # Moving weights make the window lag behind, a small momentum the running statistics.
        distances = [
            self._limits.distance(seen, window.mean, window.var_unbiased, layer.eps),
            self._limits.distance(seen, running.mean, running.var, layer.eps),
        ]
        distance = dataclasses.replace(
            distances[0],
            shift=np.minimum(*(distance.shift for distance in distances)),
            ratio=np.minimum(*(distance.ratio for distance in distances)),
        )
        if seen.dropout_before:
            is_by_dropout = seen.var_unbiased < window.var_unbiased
            distance = dataclasses.replace(
                distance, ratio=np.where(is_by_dropout, 0.0, distance.ratio)
            )
        if distance.worst is None:
            yield self.skip(layer, "no channel has finite statistics")
            return
        is_beyond = distance.excess > 1.0 + self._lag(window, running, layer.eps)
        if not is_beyond or layer.run.has_new_weights_in_evaluation:
            return
        is_unsure = is_sampling(seen, distance, running.var, layer.eps)
        yield self.make_finding(
            layer,
            Severity.INFO if is_unsure or is_known_cause_harmless(layer.run) else Severity.WARNING,
            "evaluation data differ from training data before the first BN layer: another "
            "preprocessing or domain",
            distance.worst,
            Fix(
                "compare mean and standard deviation of a training and an evaluation batch; to "
                "adapt to a new domain, call bnguard.recalibrate(model, target_loader)"
            ),
            step=seen.step,
        )

    def _lag(self, window: BatchWindow, running: RunningStatistics, eps: float) -> float:
        """Return how far moving weights take training data from its own average, in limits."""
        with np.errstate(all="ignore"):
            # Of values that move evenly, the newest is √3 standard deviations from the mean.
            moved = np.maximum(window.var_of_means - window.var_of_means_successive, 0.0)
            moved = np.sqrt(3.0 * moved / (window.var_unbiased + eps))
            apart = np.abs(shift_std(window.mean, running.mean, running.var, eps))
            ratio = np.abs(log_variance_ratio(window.var_unbiased, running.var, eps))
        return Distance(
            np.maximum(moved, apart),
            ratio,
            self.max_shift_std,
            self.max_log_variance_ratio,
            self.channel_quantile,
        ).excess
