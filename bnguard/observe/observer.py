"""Observes the BN layers of a model: owns the probes, and condenses what they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
from torch import nn
from torch.optim import Optimizer

from bnguard.layers.bn_layer import BatchNormLayer, find_layers
from bnguard.observe.batch_statistics import BatchProbe, StreamProbe, fitting
from bnguard.observe.eval_statistics import EvalProbe, drops_values
from bnguard.observe.history import BatchWindow, EvalWindow, History, LayerHistory, ModeGap, Run
from bnguard.observe.hooks import Hooks, paused
from bnguard.observe.layer_calls import ShapeProbe
from bnguard.observe.mode_gap import GapProbe
from bnguard.observe.model_inputs import Entrance, FinitenessProbe, SampleProbe
from bnguard.observe.model_state import (
    BroadcastProbe,
    LoadingProbe,
    OptimizerProbe,
    WeightProbe,
    describe_layers,
    running_statistics,
)
from bnguard.observe.nan_origin import OriginProbe
from bnguard.observe.running_buffers import BufferReading
from bnguard.observe.unknown_layers import UnknownProbe
from bnguard.observe.windows import Plan

# Mode gaps that are kept beside the newest, to tell a gap that lasts from one that passes.
_MAX_EARLIER_GAPS = 4


class Observer:
    """Tells the probes when a step is done, and the history what they read.

    Args:
        model: The model; left as it is, but for hooks that :meth:`close` takes off.
        optimizers: What trains the model, as far as that is known.
        eval_batches: First batches that are read in each evaluation; of the rest ever fewer are.
            As many batches of fewer than 32 samples count as one as have 32 together.
        planned_steps: Steps that training will take in all, None where that is not known.
        plan: What loader and trainer say of the training before its first batch.
        restore_poisoned: Put the last finite statistics back in the step that poisons them.
        on_batch_of_one: Called before a layer meets its first batch with one value per channel.

    Attributes:
        model: The model.
        layers: The BN layers that the model has now.
        steps: Training steps observed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizers: Iterable[Optimizer],
        eval_batches: int,
        planned_steps: int | None,
        plan: Plan,
        restore_poisoned: bool,
        on_batch_of_one: Callable[[], None],
    ) -> None:
        self.layers = find_layers(model)
        self.steps = 0
        self._is_closed = False
        self._is_loaded = False
        self.model = model
        self._eval_batches = eval_batches
        self._planned_steps = planned_steps
        self._plan = plan
        self._steps_in_eval_mode = self._now_in_eval_mode = self._longest_in_eval_mode = 0
        self._has_new_weights = False
        self._is_bystander: bool | None = None
        self._on_batch_of_one = on_batch_of_one
        self._step = 0
        self._batch_of_one_steps: dict[str, int] = {}
        self._evaluated: dict[str, EvalWindow] = {}
        self._gap: ModeGap | str = Run().mode_gap_reason
        self._earlier_gaps: tuple[ModeGap, ...] = ()
        self._origin: OriginProbe | None = None
        self._following: dict[str, EvalWindow] = {}
        self._followers: tuple[BatchNormLayer, ...] = ()
        self._follower_probe = EvalProbe(model, (), eval_batches)

        self._batches = BatchProbe(self.layers, restore_poisoned=restore_poisoned)
        self._shapes = ShapeProbe(model, self.layers, self._note_batch_of_one)
        self._broadcasts = BroadcastProbe(model, self._batches.forget_changes)
        self._loading = LoadingProbe(self.layers, self._note_loading)
        self._evaluation_hooks: tuple[Hooks, ...] = ()
        self._streams = StreamProbe(self._shapes)
        self._samples = SampleProbe(plan.accumulated_batches)
        self._finiteness = FinitenessProbe()
        self._unknown = UnknownProbe(model, self.layers)
        self._entrance = Entrance(model, [self._samples.note, self._finiteness.note])
        self._at_start = self._batches.readings()
        self._trained_by = OptimizerProbe(optimizers, self.layers)
        self._weights = WeightProbe(model)
        self._described_at_start = describe_layers(model)
        self._places = _places_of(self.layers)
        self._choose_sources()
        self._follow_entrance()

    def follow_optimizer(self, optimizer: Optimizer) -> None:
        """Count in an optimizer that trains the model from now on."""
        self._trained_by.follow(optimizer)

    def step(self, step: int) -> None:
        """Read what the training step just taken, number ``step``, left in the buffers."""
        self._raise_errors()
        self._step = step
        self.steps += 1
        is_in_eval_mode = not self.model.training
        self._steps_in_eval_mode += is_in_eval_mode
        self._now_in_eval_mode = self._now_in_eval_mode + 1 if is_in_eval_mode else 0
        self._longest_in_eval_mode = max(self._longest_in_eval_mode, self._now_in_eval_mode)
        self._weights.note_step()
        self._shapes.step = step + 1
        self._finiteness.step = step + 1
        self._samples.start_step()
        if self._origin is not None:
            self._origin.step = step + 1
        self._batches.read(step)
        if self.steps == 1:
            if self._is_loaded:
                self._weights.start_anew()
            self.follow_model()

    def follow_model(self) -> None:
        """Notice layers that were added, removed or converted, and calls that need another probe.

        It walks through the modules of the model, so that it is done now and then.
        """
        if self._is_closed:
            return
        self._weights.follow_model()
        layers = find_layers(self.model)
        places = _places_of(layers)
        if places != self._places:
            self.layers, self._places = layers, places
            self._batches.follow(layers)
            self._shapes.follow(layers)
            self._loading.follow(layers)
            self._evaluated = fitting(self._evaluated, layers)
        calls = {layer.name: self._shapes.records[layer.name].calls for layer in layers}
        self._streams.follow(
            layer for layer in layers if calls[layer.name].may_be_of_several_sources
        )
        self._choose_sources()
        self._follow_entrance()
        followers = tuple(self._find_followers())
        if followers != self._followers:
            self._followers = followers
            self._watch_followers()

    def start_window(self) -> None:
        """Begin a new window of batch statistics, and keep the one that ends as the newest full."""
        self._batches.start_window()
        self._samples.start_window()
        self._watch_followers()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Read what arrives at the layers in eval mode, and then measure the mode gap."""
        self.follow_model()
        if self._is_bystander is None and self.steps:
            self._is_bystander = self._was_never_called()
        moments = EvalProbe(self.model, self.layers, self._eval_batches)
        self._evaluation_hooks = (moments.hooks,)
        held = self._held_in_eval_mode()
        gap = GapProbe(self.model, [layer for layer in self.layers if layer.name not in held])
        self._evaluation_hooks = (moments.hooks, gap.hooks)
        self._weights.start_evaluation()
        self._shapes.is_evaluating = True
        try:
            with paused(*self._training_hooks):
                yield
            self._raise_errors()
            self._has_new_weights = self.steps > 0 and (
                self._weights.have_changed()
                # Those of a copy beside the model are written while the model trains.
                or (bool(self._is_bystander) and self._weights.have_changed_since_start(self.model))
            )
            moments.hooks.close()
            gap.hooks.close()
            self._evaluated.update(
                (name, dataclasses.replace(window, is_held=name in held))
                for name, window in moments.windows(self._step).items()
            )
            with paused(self._shapes.hooks, *self._training_hooks):
                if isinstance(self._gap, ModeGap):
                    self._earlier_gaps = (*self._earlier_gaps, self._gap)[-_MAX_EARLIER_GAPS:]
                self._gap = gap.measure()
        finally:
            self._shapes.is_evaluating = False
            moments.hooks.close()
            gap.close()
            self._batches.forget_changes()

    def catch_up(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Read the call of a module in the midst of which an evaluation began."""
        for hooks in self._evaluation_hooks:
            hooks.catch_up(module, args, kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing inside, and take the buffers as they are at the end."""
        with paused(self._shapes.hooks, *self._training_hooks, *self._evaluation_hooks):
            yield
        self._batches.forget_changes()

    def forget_changes(self) -> None:
        """Take the buffers as they are now, whatever changed them since the newest step."""
        self._batches.forget_changes()

    def note_training(self) -> None:
        """Note that the loop goes on after a step, without an evaluation between."""
        self._weights.note_training()

    def is_dropping(self) -> bool:
        """Return whether dropout acts, as when several passes measure the uncertainty."""
        return any(module.training for module in self.model.modules() if drops_values(module))

    def state_now(self) -> tuple[object, ...]:
        """Return what changes with any weight, or any statistic of the BN layers, cheaply."""
        tensors = [
            tensor
            for layer in self.layers
            if not layer.is_sharded
            for tensor in (*layer.affine, layer.running_mean, layer.running_var)
            if tensor is not None and not tensor.is_inference() and not tensor.is_meta
        ]
        versions = tuple((tensor._version, tensor.data_ptr()) for tensor in tensors)
        return (self._weights.version_now(), versions)

    def windows(self) -> dict[str, BatchWindow]:
        """Return the window of batch statistics that each layer is judged by."""
        return self._batches.windows()

    def resume(self, windows: Mapping[str, BatchWindow]) -> None:
        """Go on from the windows of an interrupted run, until newer ones are full.

        Those of layers that are others now are left out.
        """
        self._batches.resume(windows)

    def history(self, *, is_settled: bool) -> History:
        """Return what was observed so far.

        Args:
            is_settled: Whether the statistics are to be judged as they are now, with no further
                update before they are used.
        """
        self.follow_model()
        if self.steps == 0:
            # A loop that tells of no step moves the buffers all the same.
            self._batches.forget_changes()
        readings = self._batches.readings()
        self._look_for_origin(readings)
        owned = self._trained_by.owned_parameters()
        run = Run(
            steps=self.steps,
            planned_steps=self._planned_steps,
            is_settled=is_settled,
            mode_gap=self._gap if isinstance(self._gap, ModeGap) else None,
            mode_gap_reason=self._gap if isinstance(self._gap, str) else "",
            earlier_mode_gaps=self._earlier_gaps,
            origin=None if self._origin is None else self._origin.origin,
            inputs=self._samples.window(),
            bad_input_step=self._finiteness.first_bad_step(),
            plan=self._plan,
            steps_in_eval_mode=self._steps_in_eval_mode,
            longest_in_eval_mode=self._longest_in_eval_mode,
            has_new_weights_in_evaluation=self._has_new_weights,
            unknown=self._unknown.found(),
            is_adversarial=self._entrance.is_fed_by_network or self._trained_by.are_several,
            is_optimized=self._trained_by.trains(self.model) if owned else None,
        )
        described = describe_layers(self.model)
        self._following.update(self._follower_probe.windows(self._step))
        return History(
            layers=tuple(
                self._layer_history(
                    layer, described[layer.name], readings.get(layer.name), owned, run
                )
                for layer in self.layers
                if layer.name in described
            ),
            run=run,
        )

    def close(self) -> None:
        """Take the hooks off; what was observed stays."""
        self._is_closed = True
        for hooks in self._all_hooks:
            hooks.close()

    def _raise_errors(self) -> None:
        """Raise here, where a caller can take it, what a hook had to keep from the forward."""
        for hooks in self._all_hooks:
            hooks.raise_error()

    @property
    def _all_hooks(self) -> tuple[Hooks, ...]:
        always = (self._shapes.hooks, self._broadcasts.hooks, self._loading.hooks)
        return (*always, *self._training_hooks, *self._evaluation_hooks)

    @property
    def _training_hooks(self) -> list[Hooks]:
        """The hooks, but for the cheap ones on shapes, that look at training and nothing else."""
        hooks = [
            self._unknown.hooks,
            self._batches.hooks,
            self._streams.hooks,
            self._entrance.hooks,
            self._follower_probe.hooks,
        ]
        return hooks if self._origin is None else [*hooks, self._origin.hooks]

    def _layer_history(
        self,
        layer: BatchNormLayer,
        described: LayerHistory,
        reading: BufferReading | None,
        owned: set[int],
        run: Run,
    ) -> LayerHistory:
        shapes = self._shapes.records[layer.name]
        counts = shapes.values_per_channel()
        start = self._at_start.get(layer.name)
        described_at_start = self._described_at_start.get(layer.name)
        is_affine_frozen = self._trained_by.is_affine_frozen(layer, owned)
        # Never called in training, and gamma moves although it cannot learn: others write to it.
        is_written = (
            not counts
            and (bool(is_affine_frozen) or run.is_optimized is False)
            and described_at_start is not None
            and described.gamma is not None
            and described_at_start.gamma is not None
            and not np.array_equal(described.gamma, described_at_start.gamma)
        )
        return dataclasses.replace(
            described,
            is_affine_frozen=is_affine_frozen,
            is_affine_frozen_at_start=self._was_affine_frozen(layer, described_at_start),
            is_left_out=described.is_affine_frozen is False
            and self._trained_by.is_left_out(layer, owned),
            weight_decay=self._trained_by.weight_decay(layer),
            position=shapes.position,
            running=None if reading is None else reading.running,
            running_at_start=None if start is None else start.running,
            # A counter that is copied counts the updates of another layer.
            updates_seen=0 if reading is None or is_written else reading.updates,
            source=self._batches.source(layer.name),
            calls=dataclasses.replace(shapes.calls, in_training=sum(counts.values())),
            streams=self._streams.streams(layer.name),
            without_grad=self._streams.without_grad(layer.name),
            samples=shapes.samples(),
            values_per_channel=counts,
            batch_of_one_step=self._batch_of_one_steps.get(layer.name),
            poisoned_step=None if reading is None else reading.poisoned_step,
            restored_updates=0 if reading is None else reading.restored_updates,
            window=self._batches.window(layer.name),
            evaluated=self._evaluated.get(layer.name) or self._following.get(layer.name),
            is_following=layer in self._followers,
            run=run,
        )

    def _was_affine_frozen(
        self, layer: BatchNormLayer, described: LayerHistory | None
    ) -> bool | None:
        """Return whether the affine parameters could not learn when watching began."""
        if self._trained_by.left_out_at_start(layer):
            return True
        return None if described is None else described.is_affine_frozen

    def _held_in_eval_mode(self) -> set[str]:
        """Return the layers that the newest step of training called in eval mode alone."""
        if not self.steps:
            return set()
        return {
            layer.name
            for layer in self.layers
            if self._shapes.records[layer.name].is_held_in_eval_mode(self._shapes.step - 1)
        }

    def _was_never_called(self) -> bool:
        """Return whether no batch of training reached the model, as one that others write to."""
        return not self._trained_by.trains(self.model) and all(
            self._shapes.records[layer.name].position is None for layer in self.layers
        )

    def _find_followers(self) -> Iterator[BatchNormLayer]:
        """Yield the layers whose weights others write, and whose statistics nobody does.

        So are those of a teacher or a target network, of which the parameters alone are copied.
        """
        if not self.steps:
            return
        parts = list(self._trained_by.untrained_parts(self.model))
        calls = [self._shapes.records[layer.name].calls for layer in self.layers]
        is_optimizer_known = bool(self._trained_by.owned_parameters())
        if not is_optimizer_known and not any(call.in_eval_mode_with_grad for call in calls):
            parts = [self.model]
        for part in parts:
            modules = set(part.modules())
            layers = [layer for layer in self.layers if layer.module in modules]
            if layers and self._weights.have_changed_since_start(part):
                yield from filter(self._is_as_at_start, layers)

    def _is_as_at_start(self, layer: BatchNormLayer) -> bool:
        """Return whether the statistics of a layer are those of when watching began."""
        start, calls = self._at_start.get(layer.name), self._shapes.records[layer.name]
        running = running_statistics(layer.running_mean, layer.running_var, layer.counter)
        if start is None or running is None or calls.values_per_channel():
            return False
        return bool(
            np.array_equal(start.running.mean, running.mean)
            and np.array_equal(start.running.var, running.var)
        )

    def _watch_followers(self) -> None:
        """Read anew what the followers are given while others train."""
        self._following.update(self._follower_probe.windows(self._step))
        self._follower_probe.hooks.close()
        self._follower_probe = EvalProbe(self.model, self._followers, self._eval_batches)

    def _choose_sources(self) -> None:
        """Let the calls that were seen decide where the batch statistics of a layer are read."""
        self._batches.choose_sources(
            {layer.name: self._shapes.records[layer.name].repeats() for layer in self.layers}
        )

    def _follow_entrance(self) -> None:
        """Listen to what the modules around the layer that is called first are given."""
        if self.layers:
            positions = {name: record.position for name, record in self._shapes.records.items()}
            first = min(self.layers, key=lambda layer: positions[layer.name] or 0)
            self._entrance.follow(first.module)

    def _look_for_origin(self, readings: dict[str, BufferReading]) -> None:
        """Once statistics were poisoned, wait for the next bad forward and see where it begins."""
        if self._is_closed or self._origin is not None:
            return
        if any(reading.poisoned_step is not None for reading in readings.values()):
            self._origin = OriginProbe(self.model, self._step + 1)

    def _note_loading(self, layer: BatchNormLayer) -> None:
        """Take what was loaded into a layer as it is: it is no update of training."""
        self._batches.forget_changes()
        self._is_loaded = True
        start = self._at_start.get(layer.name)
        running = running_statistics(layer.running_mean, layer.running_var, layer.counter)
        if self.steps == 0 and start is not None and running is not None:
            self._at_start[layer.name] = dataclasses.replace(start, running=running)
            self._trained_by.note_start(layer, self._trained_by.owned_parameters())

    def _note_batch_of_one(self, name: str) -> None:
        """Tell at once, since PyTorch is about to refuse the batch without naming the layer."""
        self._batch_of_one_steps.setdefault(name, self._step + 1)
        self._on_batch_of_one()


def _places_of(layers: Iterable[BatchNormLayer]) -> list[tuple[object, ...]]:
    """Return what has to be followed anew when it changes: the modules, and their buffers."""
    places: list[tuple[object, ...]] = []
    for layer in layers:
        mean = layer.running_mean
        kind = None if mean is None else (mean.shape, mean.dtype, mean.device)
        places.append((layer.name, layer.module, kind))
    return places
