"""What was observed so far, condensed a layer: plain numbers on the host, ready for the rules.

Arrays have shape ``(C,)``, a value per channel, in float64. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from bnguard.layers.distances import (
    FORGOTTEN_WEIGHT,
    FloatArray,
    initial_weight,
    log_variance_ratio,
    shift_std,
)
from bnguard.observe.windows import (
    BadValueOrigin,
    BatchWindow,
    Calls,
    EvalWindow,
    InputWindow,
    ModeGap,
    Plan,
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

# PyTorch's default, and that of TensorFlow, which networks that come from there keep.
_USUAL_EPS = (1e-5, 1e-3)

# Nothing moves at less.
_NO_MOMENTUM = 1e-12

# Published models have momenta between this and 0.3.
_SMALLEST_USUAL_MOMENTUM = 1e-3


@dataclass(frozen=True, kw_only=True)
class Run:
    """What holds for the whole model and its training.

    Attributes:
        steps: Training steps observed; 0 for a checkpoint.
        planned_steps: Steps that training will take in all, None where that is not known.
        is_settled: No further update is expected before the statistics are used: training is
            over, a report was asked for, or this is a checkpoint.
        mode_gap: How far the two modes disagreed in the newest evaluation; None where it was not
            measured.
        mode_gap_reason: Why it was not measured.
        earlier_mode_gaps: Those of the evaluations before, the newest last.
        origin: Where a NaN or Inf appeared after one was noticed.
        inputs: How much the batches of training differ; None where the model was not called with
            a batch of numbers.
        bad_input_step: First step in which the model was given NaN or Inf; None where none was
            seen.
        plan: What was known of the training before its first batch.
        steps_in_eval_mode: Steps at whose end the model as a whole was in eval mode.
        longest_in_eval_mode: The most of them in a row.
        has_new_weights_in_evaluation: Whether weights were written between the newest step and
            the newest evaluation, as loading, averaging, pruning or rounding them does; or while
            watching a copy that no batch of training reached.
        is_adversarial: Whether networks train against each other: several optimizers train, or
            what the model is given comes from another that learns.
        is_optimized: Whether an optimizer that is known has any parameter of the model; None where
            none is known.
        weight_change: |weights - those of a reference| / |those of the reference|; None without a
            reference.
        unknown: What normalises over the batch without being a BN layer that is known.
        stored_steps: Training steps that a checkpoint says were taken; None where it does not.
    """

    steps: int = 0
    planned_steps: int | None = None
    is_settled: bool = True
    mode_gap: ModeGap | None = None
    mode_gap_reason: str = "no evaluation was watched"
    earlier_mode_gaps: tuple[ModeGap, ...] = ()
    origin: BadValueOrigin | None = None
    inputs: InputWindow | None = None
    bad_input_step: int | None = None
    plan: Plan = field(default_factory=Plan)
    steps_in_eval_mode: int = 0
    longest_in_eval_mode: int = 0
    has_new_weights_in_evaluation: bool = False
    is_adversarial: bool = False
    is_optimized: bool | None = None
    weight_change: float | None = None
    stored_steps: int | None = None
    unknown: tuple[UnknownLayer, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerHistory:
    """Everything known of one BN layer; what is not known is None or empty.

    Attributes:
        name: Dotted name in the model.
        kind: Name of the layer's class.
        channels: C.
        eps: What is added to the variance before the square root.
        is_eps_known: False for a checkpoint that does not hold it; ``eps`` is PyTorch's default
            of 1e-5 then, and :attr:`possible_eps` has what else it may be.
        momentum: Weight of the new value in an update; None for a cumulative average.
        is_momentum_known: False for a checkpoint that does not hold it; ``momentum`` is PyTorch's
            default of 0.1 then.
        training: Whether the layer is in train mode; None for a checkpoint.
        is_affine_frozen: Whether no affine parameter of the layer can learn; None where it has
            none, or is not known.
        is_affine_frozen_at_start: The same when watching began.
        is_left_out: Whether gamma or beta could learn, but no optimizer has them.
        is_following: Whether something else than training writes the weights around the layer, as
            those of a teacher or target network, and its statistics are those of the beginning.
        unsaved: Names of the statistics that the state dict of the layer leaves out.
        is_updating: Whether a forward in train mode updates the running statistics; those of a
            frozen class never do.
        position: Place in the order in which the layers were first called; None before that.
        fed_by: Class of the module that the layer directly follows; None where that is not known.
        bounded_by: Class of the activation with bounded outputs that the layer directly feeds; None
            where there is none, or that is not known.
        is_bias_cancelled: Whether that module adds a bias, which the layer takes out again.
        weight_decay: Weight decay on gamma and beta, the largest; None where not known.
        idle_children: Classes of modules inside the layer that its class never calls.
        missing_tail: Classes of the modules that layers at the same place of other blocks end in,
            where this one is a plain layer.
        gamma: The weight; None without affine parameters.
        beta: The bias; None without affine parameters.
        statistics_dtype: Element type of the running statistics, as in ``"float32"``.
        running: The running statistics now; None where untracked.
        running_at_start: The running statistics when watching began.
        running_of_reference: Those of the same layer in a reference; None without one.
        is_recalibrated: Whether the running statistics were written by a recalibration, of which
            nothing initial is left, whatever the counter says.
        updates_seen: Updates of the running statistics observed in training.
        source: Where the batch statistics were read: ``"buffers"``; or ``"autograd"`` (what it
            saved for the backward) or ``"inputs"``, and why, as in ``"inputs: momentum 0 …"``.
        calls: How often, and how, the layer was called.
        streams: Batch statistics of each of the calls in a step, where there are several; calls
            under ``torch.no_grad`` left out.
        without_grad: Batch statistics of those; None where there were none, or none were read.
        samples: Samples in the usual batch; None where none was seen.
        values_per_channel: How often a batch of n values per channel was normalised with its own
            statistics, by n.
        batch_of_one_step: First step in which n was 1.
        poisoned_step: First step after which the running statistics were not finite.
        restored_updates: Updates whose statistics were put back because they were not finite.
        window: Batch statistics of the newest window.
        evaluated: The newest evaluation.
        rank_shift_std: Largest distance of rank zero's running mean from that of another rank, in
            running standard deviations; None where ranks were not compared.
        run: What holds for the whole model.
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
    is_left_out: bool = False
    is_following: bool = False
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
    run: Run = field(default_factory=Run)

    @property
    def possible_eps(self) -> tuple[float, ...]:
        """What eps may be, the smallest first: one value where it is known."""
        return (self.eps,) if self.is_eps_known else _USUAL_EPS

    @property
    def is_untrained(self) -> bool:
        """Whether the layer says that it never had an update, and was not watched in any use."""
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
        """The n that was normalised most often with batch statistics; None where none was."""
        if not self.values_per_channel:
            return None
        return max(self.values_per_channel, key=lambda n: (self.values_per_channel[n], n))

    @cached_property
    def has_finite_affine(self) -> bool:
        """Whether gamma and beta are finite, as far as they are known."""
        affine = (part for part in (self.gamma, self.beta) if part is not None)
        return all(bool(np.isfinite(part).all()) for part in affine)

    @property
    def output_std(self) -> FloatArray | None:
        """Spread of the outputs in training, a channel each: |gamma| √(var / (var + eps)).

        From the largest variance of a batch that was seen, else from the running one.
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
        """Whether the running statistics tell how many updates they have had."""
        return self.running is not None and bool(self.running.updates)

    @property
    def unseen_calls(self) -> int:
        """Updates whose calls no hook saw, as under ``torch.compile``."""
        return max(0, self.updates_seen - self.calls.in_training - self.calls.estimating)

    @property
    def initial_weight(self) -> float | None:
        """Weight that the initial statistics (0, 1) still have; None where it cannot be told."""
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

        Statistics that are not the initial ones, next to a counter of 0 or a momentum that is not
        the weight of an average, were not made by updates: they were loaded or estimated.
        """
        if running is None or running.updates is None or self.is_recalibrated:
            return None
        is_averaging = self.momentum is None or _NO_MOMENTUM < self.momentum <= 1.0
        if not running.is_initial and (running.updates == 0 or not is_averaging):
            return None
        return initial_weight(self.momentum, running.updates)

    @cached_property
    def eval_shift_std(self) -> FloatArray | None:
        """Mean in eval mode against the running mean, in running standard deviations."""
        if self.evaluated is None:
            return None
        running = self.evaluated.running
        return shift_std(self.evaluated.mean, running.mean, running.var, self.eps)

    @cached_property
    def eval_log_variance_ratio(self) -> FloatArray | None:
        """Logarithm of the variance in eval mode over the running variance."""
        if self.evaluated is None:
            return None
        running = self.evaluated.running
        return log_variance_ratio(self.evaluated.var_unbiased, running.var, self.eps)


@dataclass(frozen=True, kw_only=True)
class History:
    """What was observed of a model so far.

    Attributes:
        layers: A history a layer, in the order of registration.
        run: What holds for the whole model.
    """

    layers: tuple[LayerHistory, ...]
    run: Run

    @property
    def layers_in_order(self) -> tuple[LayerHistory, ...]:
        """The layers that were called, in the order in which they were; all where none was."""
        called = [layer for layer in self.layers if layer.position is not None]
        return tuple(sorted(called, key=lambda layer: layer.position or 0)) or self.layers

    @property
    def first_trained(self) -> LayerHistory | None:
        """The layer called first of those that batches of training reached; else of all.

        A teacher in front says nothing of the data that the network is trained on.
        """
        called = self.layers_in_order
        trained = (
            layer
            for layer in called
            if (layer.updates_seen or layer.window is not None) and not layer.calls.are_without_grad
        )
        return next(trained, next(iter(called), None))

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read in another way than usual, or could not be seen, and why; a line each."""
        by_source: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.source != "buffers":
                by_source.setdefault(layer.source, []).append(layer.name)
        notes = [f"{_layers(names)} read from {source}" for source, names in by_source.items()]
        unseen = [layer.name for layer in self.layers if layer.unseen_calls]
        if unseen:
            notes.append(
                f"{_layers(unseen)} called where no hook sees, as under torch.compile: values per "
                "channel, streams and eval moments not known"
            )
        if not self.run.steps and any(layer.calls.in_training for layer in self.layers):
            notes.append("no step was told of: call monitor.step() after each step of training")
        elif self.run.steps and not unseen and not any(layer.evaluated for layer in self.layers):
            was_tried = any(layer.calls.in_evaluation for layer in self.layers)
            what = "evaluation ran in train mode" if was_tried else "no evaluation was seen"
            notes.append(f"{what}, so BN301, BN302 and BN305 were not judged")
        if self.run.is_optimized is False and not any(map(_is_told_of, self.layers)):
            notes.append("the optimizer given holds none of this model's parameters")
        notes += [
            f"{unknown.module or 'the model'} ({unknown.kind}, {unknown.place}) normalises over "
            f"the batch and is not watched: {unknown.advice}"
            for unknown in self.run.unknown
        ]
        lost = [layer for layer in self.layers if layer.unsaved]
        if lost:
            names = " and ".join(lost[0].unsaved)
            where = _layers([layer.name for layer in lost])
            notes.append(
                f"{names} of {where} are not in the state dict, so saving loses them: "
                "register_buffer"
            )
        notes += self._notes_on_momentum()
        return tuple(notes)

    def _notes_on_momentum(self) -> Iterator[str]:
        """Yield what is assumed of momentum, where other values that are usual decide otherwise."""
        undecided = [
            (layer.running.updates, layer.name)
            for layer in self.layers
            if layer.running is not None
            and layer.running.updates is not None
            and not layer.is_momentum_known
            and layer.initial_weight is not None
            and layer.initial_weight <= FORGOTTEN_WEIGHT
            and initial_weight(_SMALLEST_USUAL_MOMENTUM, layer.running.updates) > FORGOTTEN_WEIGHT
        ]
        if undecided:
            fewest, _ = min(undecided)
            needed = 1.0 - FORGOTTEN_WEIGHT ** (1.0 / fewest)
            yield (
                f"momentum is not stored, and 0.1 is assumed: below {needed:.2g} the {fewest} "
                f"updates of {_layers([name for _, name in undecided])} were too few"
            )


def _is_told_of(layer: LayerHistory) -> bool:
    """Return whether BN101 says that no optimizer has the layer."""
    return layer.is_left_out and bool(layer.is_affine_frozen and layer.updates_seen)


def _layers(names: list[str]) -> str:
    if len(names) == 1:
        return names[0] or "the layer"
    return f"{len(names)} layers, {names[0]} first,"
