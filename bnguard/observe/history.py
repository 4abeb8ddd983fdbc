"""Everything observed so far, condensed per layer: the plain numbers that the rules judge.

Arrays are float64 of shape ``(C,)``, a value per channel. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from bnguard.layers.distances import (
    FloatArray,
    initial_weight,
    log_variance_ratio,
    shift_std,
)
from bnguard.observe.budget import Overhead
from bnguard.observe.training_plan import Plan
from bnguard.observe.windows import (
    BadValueOrigin,
    BatchWindow,
    Calls,
    EvalWindow,
    InputWindow,
    LayerView,
    ModeGap,
    RunningStatistics,
    Stream,
    UnknownLayer,
)

__all__ = [
    "BadValueOrigin",
    "BatchWindow",
    "Calls",
    "EvalWindow",
    "History",
    "InputWindow",
    "LayerHistory",
    "ModeGap",
    "Run",
    "RunningStatistics",
    "Stream",
]

# The defaults of PyTorch and of TensorFlow, which converted networks keep.
_USUAL_EPS = (1e-5, 1e-3)

# Below this weight an update changes nothing.
_NO_MOMENTUM = 1e-12


@dataclass(frozen=True, kw_only=True)
class Run:
    """Facts about the whole model and its training.

    Attributes:
        steps: Training steps observed; 0 for a checkpoint.
        planned_steps: Steps that training will take in all; None if unknown.
        is_settled: Whether the statistics are used without a further update, because training is
            over, a report was asked for, or this is a checkpoint.
        mode_gap: Mode gap of the newest evaluation; None if not measured.
        mode_gap_reason: Why it was not measured.
        earlier_mode_gaps: Those of the evaluations before, the newest last.
        mode_gap_in_training: The same on batches of training, by the weights of the newest
            evaluation; None unless :attr:`mode_gap` is large.
        origin: Where NaN or Inf appeared.
        inputs: How much the training batches differ; None if no input has samples to compare.
        bad_input_step: First step whose input held NaN or Inf.
        plan: What was known before the first batch.
        steps_in_eval_mode: Steps at whose end the whole model was in eval mode.
        longest_in_eval_mode: The most of them in a row.
        has_new_weights_in_evaluation: Whether weights were written between the newest step and the
            newest evaluation (loading, averaging, pruning, rounding), or at any time while watching
            a copy that no training batch reached.
        is_adversarial: Whether networks train against each other: there are several optimizers, or
            the inputs come from another network that learns.
        is_optimized: Whether a known optimizer has a parameter of the model; None without one.
        is_adaptation: Whether the optimizers have gammas and betas alone, as at test time.
        weight_change: |weights - reference| / |reference|; None without a reference.
        stored_steps: Training steps that a checkpoint records; None if it does not.
        unknown: Modules that normalise over the batch and are not known as BN layers.
        overhead: What watching cost; None if no step was watched.
    """

    steps: int = 0
    planned_steps: int | None = None
    is_settled: bool = True
    mode_gap: ModeGap | None = None
    mode_gap_reason: str = "no evaluation was watched"
    earlier_mode_gaps: tuple[ModeGap, ...] = ()
    mode_gap_in_training: ModeGap | None = None
    origin: BadValueOrigin | None = None
    inputs: InputWindow | None = None
    bad_input_step: int | None = None
    plan: Plan = field(default_factory=Plan)
    steps_in_eval_mode: int = 0
    longest_in_eval_mode: int = 0
    has_new_weights_in_evaluation: bool = False
    is_adversarial: bool = False
    is_optimized: bool | None = None
    is_adaptation: bool = False
    weight_change: float | None = None
    stored_steps: int | None = None
    unknown: tuple[UnknownLayer, ...] = ()
    overhead: Overhead | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerHistory:
    """Everything known about one BN layer; None or empty if unknown.

    Attributes:
        name: Dotted name in the model.
        kind: Name of the layer's class.
        channels: C.
        eps: Added to the variance before the square root.
        is_eps_known: False for a checkpoint without it; ``eps`` is then PyTorch's default of 1e-5,
            and :attr:`possible_eps` lists the alternatives.
        momentum: Weight of the new value in an update; None for a cumulative average.
        is_momentum_known: False for a checkpoint without it; ``momentum`` is then PyTorch's 0.1.
        training: Whether the layer is in train mode; None for a checkpoint.
        is_affine_frozen: Whether gamma and beta cannot learn; None without them.
        is_affine_frozen_at_start: The same when watching began.
        is_held_at_start: Whether the layer was in eval mode when watching began, and a module next
            to it in train mode.
        is_left_out: Whether gamma or beta require gradients but no optimizer has them.
        has_moving_weights: Whether the statistics have to follow weights: those before the layer,
            in order of registration, are trained, or frozen gamma and beta are averages of others.
        is_following: Whether something other than training writes the weights around the layer, as
            in a teacher or target network, while its statistics stay as at the start.
        is_dropped: Whether the layer was built with running statistics, and they were removed.
        unsaved: Names of the statistics missing from the layer's state dict.
        is_updating: Whether a forward in train mode updates the running statistics.
        position: Index in the order of first calls; None before the first.
        fed_by: Class of the module directly before the layer.
        bounded_by: Class of the bounded activation directly after the layer.
        is_bias_cancelled: Whether the module before adds a bias, which the layer removes.
        weight_decay: Largest weight decay on gamma and beta.
        idle_children: Classes of modules inside the layer that its class never calls.
        missing_tail: Classes of the modules that layers at the same place of other blocks end in,
            while this one is a plain layer.
        gamma: The weight; None without affine parameters.
        beta: The bias; None without affine parameters.
        statistics_dtype: Element type of the running statistics, as in ``"float32"``.
        running: The running statistics; None if untracked.
        running_at_start: The running statistics when watching began.
        running_of_reference: The running statistics of the same layer in a reference.
        is_recalibrated: Whether a recalibration wrote the running statistics, so that nothing of
            the initial values is left, whatever the counter says.
        updates_seen: Updates of the running statistics observed in training.
        source: Where the batch statistics were read: ``"buffers"``; or ``"autograd"`` (saved for
            the backward) or ``"inputs"`` with the reason, as in ``"inputs: momentum 0 …"``.
        calls: Counts of the calls of the layer.
        streams: Batch statistics of each call in a step with gradients, if there are several.
        without_grad: Batch statistics of the calls under ``torch.no_grad``.
        samples: Most frequent batch size at the layer.
        values_per_channel: Number of batches with n values per channel, by n.
        batch_of_one_step: First step with n = 1.
        poisoned_step: First step after which the running statistics were not finite.
        restored_updates: Updates undone because they were not finite.
        window: Batch statistics of the newest window.
        evaluated: The newest evaluation.
        rank_shift_std: Largest distance of rank zero's running mean from another rank's, in running
            standard deviations.
        view: What the layer does to training, if that was asked for.
        run: Facts about the whole model.
    """

    name: str
    kind: str = "BatchNorm"
    channels: int
    eps: float = 1e-5
    is_eps_known: bool = True
    momentum: float | None = 0.1
    is_momentum_known: bool = True
    training: bool | None = None
    is_affine_frozen: bool | None = None
    is_affine_frozen_at_start: bool | None = None
    is_held_at_start: bool = False
    is_left_out: bool = False
    has_moving_weights: bool = False
    is_following: bool = False
    is_dropped: bool = False
    unsaved: tuple[str, ...] = ()
    is_updating: bool = True
    position: int | None = None
    fed_by: str | None = None
    bounded_by: str | None = None
    is_bias_cancelled: bool = False
    weight_decay: float | None = None
    idle_children: tuple[str, ...] = ()
    missing_tail: tuple[str, ...] = ()
    gamma: FloatArray | None = None
    beta: FloatArray | None = None
    statistics_dtype: str | None = None
    running: RunningStatistics | None = None
    running_at_start: RunningStatistics | None = None
    running_of_reference: RunningStatistics | None = None
    is_recalibrated: bool = False
    updates_seen: int = 0
    calls: Calls = field(default_factory=Calls)
    streams: tuple[Stream, ...] = ()
    without_grad: Stream | None = None
    source: str = "buffers"
    samples: int | None = None
    values_per_channel: Mapping[int, int] = field(default_factory=dict)
    batch_of_one_step: int | None = None
    poisoned_step: int | None = None
    restored_updates: int = 0
    window: BatchWindow | None = None
    evaluated: EvalWindow | None = None
    rank_shift_std: FloatArray | None = None
    view: LayerView | None = None
    run: Run = field(default_factory=Run)

    @property
    def possible_eps(self) -> tuple[float, ...]:
        """Candidates for eps, the smallest first; one if it is known."""
        return (self.eps,) if self.is_eps_known else _USUAL_EPS

    @property
    def is_untrained(self) -> bool:
        """Whether the layer never had an update, by its counter, and was not seen in use."""
        running = self.running
        return (
            running is not None
            and running.updates == 0
            and running.is_initial
            and not self.run.steps
            and self.evaluated is None
        )

    @property
    def typical_values_per_channel(self) -> int | None:
        """The most frequent n in training; None without a batch."""
        if not self.values_per_channel:
            return None
        return max(self.values_per_channel, key=lambda n: (self.values_per_channel[n], n))

    @cached_property
    def has_finite_affine(self) -> bool:
        """Whether gamma and beta are finite, if known."""
        affine = (part for part in (self.gamma, self.beta) if part is not None)
        return all(bool(np.isfinite(part).all()) for part in affine)

    @property
    def output_std(self) -> FloatArray | None:
        """Standard deviation of the outputs in training: |gamma| √(var / (var + eps)).

        From the largest variance of a batch if one was seen, else from the running variance.
        """
        if self.window is not None:
            var = self.window.var_max
        elif self.running is not None:
            var = self.running.var
        else:
            return None
        gamma = 1.0 if self.gamma is None or self.gamma.shape != var.shape else self.gamma
        with np.errstate(all="ignore"):
            return np.asarray(np.abs(gamma) * np.sqrt(np.abs(var) / (np.abs(var) + self.eps)))

    @property
    def is_counted(self) -> bool:
        """Whether the running statistics count their updates and have had some."""
        return self.running is not None and bool(self.running.updates)

    @property
    def unseen_calls(self) -> int:
        """Number of updates whose calls no hook saw, as under ``torch.compile``."""
        return max(0, self.updates_seen - self.calls.in_training - self.calls.estimating)

    @property
    def initial_weight(self) -> float | None:
        """Weight that the initial statistics (0, 1) still have; None if unknown."""
        return None if self._is_counter_set_back else self._initial_weight_in(self.running)

    @property
    def initial_weight_when_evaluated(self) -> float | None:
        """The same at the time of the newest evaluation."""
        return None if self.evaluated is None else self._initial_weight_in(self.evaluated.running)

    @property
    def _is_counter_set_back(self) -> bool:
        """Whether the counter is lower than at the start, as after ``update_bn``."""
        start, now = self.running_at_start, self.running
        if start is None or start.updates is None or now is None or now.updates is None:
            return False
        return now.updates < start.updates + self.updates_seen and not now.is_initial

    def _initial_weight_in(self, running: RunningStatistics | None) -> float | None:
        """Return the initial weight in these statistics.

        Statistics other than the initial ones next to a counter of 0, or a momentum that is not a
        weight, were loaded or estimated, not made by updates.
        """
        if running is None or running.updates is None or self.is_recalibrated:
            return None
        is_averaging = self.momentum is None or _NO_MOMENTUM < self.momentum <= 1.0
        if not running.is_initial and (running.updates == 0 or not is_averaging):
            return None
        return initial_weight(self.momentum, running.updates)

    @cached_property
    def eval_shift_std(self) -> FloatArray | None:
        """Shift of the mean in eval mode from the running mean, in running standard deviations."""
        if self.evaluated is None:
            return None
        running = self.evaluated.running
        return shift_std(self.evaluated.mean, running.mean, running.var, self.eps)

    @cached_property
    def eval_log_variance_ratio(self) -> FloatArray | None:
        """Log-variance ratio in eval mode: log of the variance over the running variance."""
        if self.evaluated is None:
            return None
        running = self.evaluated.running
        return log_variance_ratio(self.evaluated.var_unbiased, running.var, self.eps)


@dataclass(frozen=True, kw_only=True)
class History:
    """Everything observed of a model so far.

    Attributes:
        layers: A history per layer, in the order of registration.
        run: Facts about the whole model.
    """

    layers: tuple[LayerHistory, ...]
    run: Run

    @property
    def layers_in_order(self) -> tuple[LayerHistory, ...]:
        """The layers that were called, in the order of their first calls; all if none was."""
        called = [layer for layer in self.layers if layer.position is not None]
        return tuple(sorted(called, key=lambda layer: layer.position or 0)) or self.layers

    @property
    def first_trained(self) -> LayerHistory | None:
        """The first called layer that training batches reached; else the first of all.

        A teacher in front says nothing about the data that the network is trained on.
        """
        called = self.layers_in_order
        trained = (
            layer
            for layer in called
            if (layer.updates_seen or layer.window is not None) and not layer.calls.are_without_grad
        )
        return next(trained, next(iter(called), None))
