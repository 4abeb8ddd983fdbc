"""BN304 stale-statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.layers.distances import FloatArray
from bnguard.observe.history import History, LayerHistory, Run
from bnguard.rules.base import ModelRule
from bnguard.rules.measurements import (
    DriftLimits,
    is_known_cause_harmless,
    is_lasting,
    is_sampling,
)

_FIX = Fix("recalibrate the running statistics with the current weights", "recalibrate")
_COPY = Fix("copy the buffers as well as the parameters (load_state_dict, or buffers())")


@dataclass(frozen=True, kw_only=True)
class StaleStatistics(ModelRule):
    """The weights have changed since the running statistics were computed.

    Why it matters:
        Running statistics belong to the weights that they were computed with. Averaged weights
        (SWA, EMA), weights that are loaded, pruned or rounded after training, and models copied by
        their parameters alone are networks that no training step ever saw, evaluated with the
        statistics of another one.

    What you see:
        The original network is good; its average, its copy or the reloaded checkpoint is near
        chance in eval mode, with the right weights.

    Example:
        A teacher that follows its student::

            # Fault: only the parameters follow
            for own, new in zip(teacher.parameters(), student.parameters()):
                own.data.lerp_(new.data, 0.01)
            # Fix: the buffers follow too, unchanged
            for own, new in zip(teacher.buffers(), student.buffers()):
                own.copy_(new)

    Fix:
        Copy ``state_dict()``, not ``parameters()``. Averaged, pruned or rounded weights need new
        statistics, which is safe, is measured, and can be undone::

            torch.optim.swa_utils.update_bn(train_loader, averaged)
            bnguard.recalibrate(averaged, train_loader)

    What it does not mean:
        A network fine-tuned with BN in eval mode keeps the statistics of its reference on purpose,
        and fits them. Initial statistics are ``info`` if gamma and beta look random, or if no
        counter distinguishes frozen layers, whose statistics are folded into gamma and beta.

    Evidence:
        One of five. (1) The statistics are the initial (0, 1), and beta is not, in a checkpoint or
        a layer frozen from the start: an ``error`` if the counter says that there were updates;
        ``info`` if evaluation shows that they are folded into gamma. (2) The layer was called in
        train mode and its statistics did not change, as if a function ran on copies of the buffers;
        an ``error`` if they are exactly (0, 1) after training, as after a callback that resets them
        and sets momentum to 0; ``info`` in a meta-learner that tests in train mode. (3) Weights
        were written between the newest training step and the evaluation, or into a watched copy of
        the model, and inputs in eval mode have drifted from the statistics; ``info`` if the mode
        gap at the end is below 0.4 σ and 7 % flips. (4) The same for a teacher or target network
        that no optimizer trains and no batch updates. (5) Without a run, the statistics are those
        of the reference and the weights are not: ``bnguard.inspect(averaged, reference=model)``.

    Limits:
        min_moved_beta: 1e-4, the smallest |beta|, the median over channels, that counts as trained.
        min_lost_calls: 8 calls in train mode without any update.
        max_shift_std: 0.5 running standard deviations, half of BN301's limit, since it is known
            that the weights differ.
        max_log_variance_ratio: 0.8, for the same reason.
        max_weight_change: 0.1 of the norm of the weights against a reference. Casting to float16
            changes them by 0.0002, a moving average that copies the buffers by 0.03, without harm,
            averaging over the last epochs by more than the limit.
        channel_quantile: 0.9, as in BN301.

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization" (2018),
            section 3.2, arXiv:1803.05407.
        torch.optim.swa_utils.update_bn, and AveragedModel on ``use_buffers``.
        CuriousAI/mean-teacher#9 and DLR-RM/stable-baselines3#996, buffers that do not follow.
        zhengyang-wang/Unet_3D#5, a checkpoint without statistics.
        Lightning-AI/pytorch-lightning#14866, momentum 0 in weight averaging.
        csyhhu/L-OBS#14, a pruned network; facebookresearch/higher#103, updates that copies lose;
            TsingZ0/PFLlib#269, buffers of one client; open-mmlab/mmdetection#1217, folded ones.
    """

    code: ClassVar[str] = "BN304"
    name: ClassVar[str] = "stale-statistics"
    is_static: ClassVar[bool] = True
    explains: ClassVar[tuple[str, ...]] = ("BN303", "BN301", "BN302", "BN403")
    acts_by_statistics: ClassVar[bool] = True
    is_local: ClassVar[bool] = True

    min_moved_beta: float = 1e-4
    min_lost_calls: int = 8
    max_shift_std: float = 0.5
    max_log_variance_ratio: float = 0.8
    max_weight_change: float = 0.1
    channel_quantile: float = 0.9

    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Look for statistics that were lost, do not change, or belong to other weights."""
        is_chosen = _look_drawn(history.layers)
        if history.run.steps:
            is_chosen = not _are_lost(history.layers)
        for layer in history.layers:
            yield from self._judge(layer, is_chosen=is_chosen)

    def _judge(self, layer: LayerHistory, *, is_chosen: bool) -> Iterator[Finding | Skipped]:
        if layer.running is None:
            yield self.skip(layer, "the layer keeps no running statistics")
        elif layer.running.is_initial and layer.running.mean.size and _is_as_loaded(layer):
            yield from self._judge_lost(layer, is_chosen=is_chosen)
        elif layer.running.is_initial and layer.calls.in_training >= self.min_lost_calls:
            yield from self._reset(layer)
        elif _is_copied(layer):
            yield from self._of_reference(layer)
        elif (
            layer.run.steps
            and not layer.updates_seen
            and layer.calls.in_training >= self.min_lost_calls
        ):
            yield from self._judge_untouched(layer)
        elif layer.is_following or layer.run.has_new_weights_in_evaluation:
            yield from self._rewritten(layer)

    def _judge_lost(self, layer: LayerHistory, *, is_chosen: bool) -> Iterator[Finding | Skipped]:
        if layer.beta is None:
            yield self.skip(layer, "the layer has no beta to show whether it was trained")
            return
        moved = float(np.median(np.abs(layer.beta)))
        if not np.isfinite(moved) or moved < self.min_moved_beta:
            return
        if layer.is_momentum_known and layer.momentum == 0.0:
            yield self.skip(layer, "momentum 0 keeps the initial statistics (BN103)")
            return
        severity, why = _why_initial(layer, is_chosen=is_chosen)
        yield self.make_finding(
            layer,
            severity,
            "beta is not its initial 0, but the running statistics are still the initial mean 0 "
            f"and variance 1: {why}",
            Evidence("median |beta|", moved, self.min_moved_beta),
            Fix("load a state dict that contains the buffers, or recalibrate", "recalibrate"),
        )

    def _reset(self, layer: LayerHistory) -> Iterator[Finding]:
        # Momentum 0 is BN103.
        if layer.momentum == 0.0 or not layer.is_updating:
            return
        calls = layer.calls.in_training
        yield self.make_finding(
            layer,
            Severity.INFO if layer.calls.are_of_meta_learner else Severity.ERROR,
            f"after {calls:,} batches in train mode the running statistics are exactly the initial "
            "mean 0 and variance 1: they were reset, or momentum was 0",
            Evidence("batches without an update", calls, self.min_lost_calls),
            _FIX,
        )

    def _of_reference(self, layer: LayerHistory) -> Iterator[Finding]:
        change = layer.run.weight_change
        if change is None or not change > self.max_weight_change:
            return
        yield self.make_finding(
            layer,
            Severity.WARNING,
            "the running statistics are those of the reference, but the weights are not: they "
            "describe another network",
            Evidence("change of the weights", change, self.max_weight_change),
            _FIX,
        )

    def _judge_untouched(self, layer: LayerHistory) -> Iterator[Finding]:
        if not layer.is_updating or layer.momentum == 0.0 or layer.running is None:
            return
        if layer.running.updates is None:
            return
        yield self.make_finding(
            layer,
            Severity.INFO if layer.calls.are_of_meta_learner else Severity.WARNING,
            f"{layer.calls.in_training:,} batches were normalised in train mode, but none entered "
            "the running statistics: something runs the layer on copies of its buffers",
            Evidence("batches without an update", layer.calls.in_training, self.min_lost_calls),
            _FIX,
        )

    def _rewritten(self, layer: LayerHistory) -> Iterator[Finding]:
        seen = layer.evaluated
        if seen is None or (_are_written_too(layer) and not _is_shown_harm(layer.run)):
            return
        running = seen.running
        limits = DriftLimits(self.max_shift_std, self.max_log_variance_ratio, self.channel_quantile)
        distance = limits.distance(seen, running.mean, running.var, layer.eps)
        if distance.worst is None or not distance.is_beyond:
            return
        # A network next to the one that trains may not be the one whose modes were compared.
        is_harmless = is_known_cause_harmless(layer.run) and not layer.is_following
        is_unsure = is_sampling(seen, distance, running.var, layer.eps)
        yield self.make_finding(
            layer,
            Severity.INFO if is_unsure or is_harmless else Severity.WARNING,
            "the weights follow those of another network, but the running statistics never "
            "changed: they belong to the initial weights"
            if layer.is_following
            else "evaluation uses other weights than those that the running statistics were "
            "computed with, and its inputs do not match them",
            distance.worst,
            _COPY if layer.is_following else _FIX,
            step=seen.step,
        )


def _why_initial(layer: LayerHistory, *, is_chosen: bool) -> tuple[Severity, str]:
    """Return how bad initial statistics next to another beta are, and the likely reason."""
    updates = None if layer.running is None else layer.running.updates
    is_module = layer.training is not None
    is_without_counter = updates is None and not (is_module and layer.is_updating)
    if is_without_counter or (layer.run.steps and is_chosen):
        return (
            Severity.INFO,
            "they are folded into gamma and beta, as in some frozen layers, or were lost",
        )
    if updates:
        return Severity.ERROR, "they were lost after training"
    if is_chosen and layer.is_untrained and not layer.run.stored_steps:
        return (
            Severity.INFO,
            "gamma and beta look random, as in a network that was not trained",
        )
    return Severity.WARNING, "they were not saved, not loaded, or never updated"


def _look_drawn(layers: Iterable[LayerHistory]) -> bool:
    """Return whether gamma and beta of all layers look like samples of one distribution each.

    That is an initialisation, or a constant; training changes gamma too, and differently in each
    layer, which shows if layers are not too small.
    """
    gammas = [layer.gamma for layer in layers if layer.gamma is not None and layer.gamma.size]
    betas = [layer.beta for layer in layers if layer.beta is not None and layer.beta.size]
    if not any(map(np.ptp, gammas)):
        return True
    are_enough = len(betas) > 1 and sum(beta.size for beta in betas) >= _FEWEST_DRAWS
    return are_enough and _are_alike(gammas) and _are_alike(betas)


def _are_alike(draws: Iterable[FloatArray]) -> bool:
    """Return whether samples may be from one distribution, except those that are constant."""
    varied = [drawn for drawn in draws if np.ptp(drawn)]
    if not varied:
        return True
    together = np.concatenate(varied)
    center, spread = np.mean(together), np.std(together)
    return all(
        abs(np.mean(drawn) - center) <= _SIGMAS * spread / np.sqrt(drawn.size)
        and abs(np.log(np.std(drawn) / spread)) <= _SIGMAS / np.sqrt(2.0 * drawn.size)
        for drawn in varied
    )


def _are_lost(layers: Iterable[LayerHistory]) -> bool:
    """Return whether evaluation shows that initial statistics are not folded into gamma.

    Folded, gamma was divided by the standard deviation of the inputs: where one is large, the other
    is small.
    """
    gammas, spreads = [], []
    for layer in layers:
        seen, gamma = layer.evaluated, layer.gamma
        if seen is None or gamma is None or not seen.running.is_initial:
            continue
        with np.errstate(all="ignore"):
            logs = np.stack([np.log(np.abs(gamma)), 0.5 * np.log(seen.var_unbiased)])
        logs = logs[:, np.isfinite(logs).all(0)]
        centred = logs - logs.mean(1, keepdims=True) if logs.size else logs
        gammas.append(centred[0])
        spreads.append(centred[1])
    if not gammas:
        return False
    one, other = np.concatenate(gammas), np.concatenate(spreads)
    size = math.sqrt(float(one @ one) * float(other @ other))
    return size == 0.0 or float(one @ other) / size > _FOLDED


def _is_as_loaded(layer: LayerHistory) -> bool:
    """Return whether nothing was trained, or the layer was frozen in all of the training."""
    if layer.is_following or layer.run.has_new_weights_in_evaluation:
        return not layer.run.steps
    was_trained = layer.calls.in_training or layer.updates_seen or not layer.is_affine_frozen
    return not (layer.run.steps and was_trained)


# Correlation of gamma and the spread of the inputs, both as logarithms, below which statistics are
# folded into gamma: -0.2 to -0.5 in small networks, and 0.3 to 0.5 if they were lost.
_FOLDED = -0.1

# Standard errors that a mean or a standard deviation may be off, in hundreds of layers.
_SIGMAS = 4.5
_FEWEST_DRAWS = 256

# Beyond what casting to half precision rounds.
_ROUNDING = 1e-2


def _is_shown_harm(run: Run) -> bool:
    """Return whether the mode gap shows harm, and goes on showing it."""
    return run.mode_gap is not None and is_lasting(run) and not is_known_cause_harmless(run)


def _are_written_too(layer: LayerHistory) -> bool:
    """Return whether something else writes the statistics of a copy as well as its weights."""
    start, now = layer.running_at_start, layer.running
    if start is None or now is None or layer.calls.in_training or layer.unseen_calls:
        return False
    return start.mean.shape == now.mean.shape and not np.array_equal(start.mean, now.mean)


def _is_copied(layer: LayerHistory) -> bool:
    """Return whether the running statistics are those of the reference."""
    own, other = layer.running, layer.running_of_reference
    if own is None or other is None or own.mean.shape != other.mean.shape:
        return False
    return bool(
        np.allclose(own.mean, other.mean, rtol=_ROUNDING, atol=1e-6)
        and np.allclose(own.var, other.var, rtol=_ROUNDING, atol=1e-6)
    )
