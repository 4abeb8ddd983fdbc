"""The observer of a model: owns the probes, and condenses their readings to a history."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from bnguard.layers.bn_layer import BatchNormLayer, find_layers, is_wrapper
from bnguard.layers.distances import FloatArray
from bnguard.observe.batch_statistics import BatchProbe
from bnguard.observe.budget import Overhead
from bnguard.observe.call_statistics import StreamProbe
from bnguard.observe.evaluation import EvaluationProbe
from bnguard.observe.followers import FollowerProbe
from bnguard.observe.history import History, LayerHistory, ModeGap, Run
from bnguard.observe.hooks import Hooks, pause_hooks
from bnguard.observe.layer_calls import ShapeProbe
from bnguard.observe.layer_description import describe_layers, running_statistics
from bnguard.observe.live_objects import find_loader_in_use
from bnguard.observe.model_inputs import Entrance, SampleProbe
from bnguard.observe.nan_origin import OriginProbe
from bnguard.observe.trained_parameters import OptimizerProbe, WeightProbe
from bnguard.observe.training_plan import Plan, plan_training
from bnguard.observe.training_views import ViewProbe
from bnguard.observe.unknown_layers import UnknownProbe

# Of running statistics that can be read without a copy.
_NUMPY_DTYPES = (torch.float16, torch.float32, torch.float64)


class Observer:
    """Reads the BN layers of a model after each step and in each evaluation.

    :meth:`close` removes the hooks, and nothing else of the model changes. The arguments are those
    of :func:`bnguard.watch`, and a function called before a layer's first batch with one value per
    channel.

    Attributes:
        model: The model.
        layers: Its BN layers.
        batches: The batch statistics of the layers.
        evaluations: What evaluations showed.
        weights: What writes to the weights.
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
        views: ViewProbe | None = None,
    ) -> None:
        self.model = model
        self.layers = find_layers(model)
        self.steps = 0
        self._step = 0
        self._steps_in_eval_mode = self._now_in_eval_mode = self._longest_in_eval_mode = 0
        self._planned_steps = planned_steps
        self._plan = plan
        self._views = views
        # While steps are passed over: the paused hooks, and a value that shows NaN or Inf.
        self._pause: ExitStack | None = None
        self._last: FloatArray | None = None
        self._errors_before = Hooks.errors
        self._is_closed = self._is_loaded = False
        held = _find_held_among_others(model, self.layers)
        self._at_start = {
            name: dataclasses.replace(described, is_held_at_start=name in held)
            for name, described in describe_layers(model).items()
        }
        self._places = _places_of(self.layers)

        self.batches = BatchProbe(self.layers, restore_poisoned=restore_poisoned)
        self.weights = WeightProbe(model, self.layers)
        self._trained_by = OptimizerProbe(optimizers, self.layers)
        self._shapes = ShapeProbe(model, self.layers, on_batch_of_one)
        self._streams = StreamProbe(self._shapes)
        self._samples = SampleProbe(plan.accumulated_batches)
        self._entrance = Entrance(model, self._samples.note)
        self._unknown = UnknownProbe(model, self.layers)
        self._origin = OriginProbe(model)
        self.evaluations = EvaluationProbe(
            model, self.layers, self._shapes, self._trained_by, self.weights, eval_batches
        )
        self._followers = FollowerProbe(
            model,
            self._shapes.records,
            self._trained_by,
            self.weights,
            self._at_start,
            eval_batches,
        )
        self._other_writes = Hooks()
        self._watch_other_writes()
        self._choose_sources()
        self._follow_entrance()

    def follow_optimizer(self, optimizer: Optimizer) -> None:
        """Count in an optimizer that trains the model from now on."""
        self._trained_by.follow(optimizer)

    def find_loader(self) -> None:
        """Look for the loader that the training loop draws from, unless one was given.

        Its last batch is not planned with: the loop may skip it.
        """
        if self._plan.batch_size is not None:
            return
        found = plan_training(find_loader_in_use())
        self._plan = dataclasses.replace(
            self._plan,
            batch_size=found.batch_size,
            label_run=found.label_run,
            shuffled_label_run=found.shuffled_label_run,
        )

    def step(self, step: int) -> None:
        """Read the buffers after training step number ``step``."""
        self._raise_errors()
        self._unknown.end_look()
        self._count_step(step)
        if self._pause is None:
            self.batches.read(step)
        else:
            self._end_pause()
        if self._views is not None:
            self._views.note_step(step, self.layers)
        if self.steps == 1:
            if self._is_loaded:
                self.weights.start_anew()
                self._note_loaded_weights()
            self.follow_model()
        if self.steps <= 2:
            self.weights.note_places()

    def _note_loaded_weights(self) -> None:
        """Take gamma and beta that were loaded for those of the start, as the statistics are."""
        for name, now in describe_layers(self.model).items():
            if (start := self._at_start.get(name)) is not None:
                self._at_start[name] = dataclasses.replace(start, gamma=now.gamma, beta=now.beta)

    def pass_over(self, step: int) -> None:
        """Count training step number ``step`` without reading the buffers, to save time.

        Unless it poisons the statistics of the last layer, as NaN and Inf in any layer do.
        """
        self._raise_errors()
        if self._pause is None:
            self._pause = ExitStack()
            hooks = (self._entrance.hooks, self.batches.hooks, self._streams.hooks)
            self._pause.enter_context(pause_hooks(*hooks))
            self._last = self._value_of_last_layer()
        self._count_step(step)
        if self._last is not None and not math.isfinite(self._last[-1]):
            self._end_pause()

    def _end_pause(self) -> None:
        if self._pause is not None:
            self._pause.close()
        self._pause = None
        self.batches.skip_to(self._step)

    def _value_of_last_layer(self) -> FloatArray | None:
        """Return a view of the running variance of the layer that is called last.

        None without layers, and if the last one is not on the CPU, has a dtype that NumPy lacks,
        or is poisoned already.
        """
        positions = {layer: self._shapes.records[layer.name].position for layer in self.layers}
        last = max(self.layers, key=lambda layer: positions[layer] or 0, default=None)
        var = None if last is None else last.running_var
        if type(var) is not Tensor or not var.is_cpu or var.dtype not in _NUMPY_DTYPES:
            return None
        values: FloatArray = var.detach().numpy().reshape(-1)
        return values if values.size and math.isfinite(values[-1]) else None

    def _count_step(self, step: int) -> None:
        # The batches of a step, whose gradients are accumulated, have one number.
        if step != self._step or not self.steps:
            self.steps += 1
            is_in_eval_mode = not self.model.training
            self._steps_in_eval_mode += is_in_eval_mode
            self._now_in_eval_mode = self._now_in_eval_mode + 1 if is_in_eval_mode else 0
            self._longest_in_eval_mode = max(self._longest_in_eval_mode, self._now_in_eval_mode)
        self._step = step
        self.weights.note_step()
        self._shapes.start_step(step + 1)
        self._samples.start_step()
        self._entrance.step = self._origin.step = step + 1

    def follow_model(self) -> None:
        """Notice layers that were added, removed or converted, and calls that need another probe.

        Walks through all modules, so it should not run at every step.
        """
        if self._is_closed:
            return
        self._shapes.wake()
        layers = find_layers(self.model)
        self.weights.follow_model(layers)
        places = _places_of(layers)
        if places != self._places:
            self.layers, self._places = layers, places
            self.batches.follow(layers)
            self._shapes.follow(layers)
            self.evaluations.follow(layers)
            self._watch_other_writes()
        records = self._shapes.records
        self._streams.follow(
            layer for layer in layers if records[layer.name].calls.may_be_of_several_sources
        )
        self._choose_sources()
        self._follow_entrance()
        if self.steps:
            self._followers.follow_model(self.layers, self._step)

    def start_window(self) -> None:
        """Begin a new window of batch statistics and keep the old one as the newest full one."""
        self.batches.start_window()
        self._samples.start_window()
        self.weights.note_places()
        self._followers.start_window(self._step)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Read the inputs of the layers in eval mode, then measure the mode gap."""
        self._catch_up()
        self.follow_model()
        self.evaluations.begin(self.steps)
        try:
            with self._apart_from_training():
                yield
                self._raise_errors()
                with pause_hooks(self._shapes.hooks):
                    self.evaluations.end(self._step)
        finally:
            self.evaluations.drop()

    @contextmanager
    def pass_over_evaluation(self) -> Iterator[None]:
        """Read nothing of an evaluation, to save time; its writes to buffers are not updates."""
        self._catch_up()
        with self._apart_from_training():
            yield

    @contextmanager
    def _apart_from_training(self) -> Iterator[None]:
        """Count nothing inside as training, which goes on from the statistics left behind."""
        self.weights.note_evaluation()
        self._shapes.is_evaluating = True
        try:
            with pause_hooks(*self._training_hooks):
                yield
        finally:
            self._shapes.is_evaluating = False
            self.batches.forget_changes()

    def catch_up(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Read the call of a module in the midst of which an evaluation began."""
        for hooks in self.evaluations.hooks:
            hooks.catch_up(module, args, kwargs)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Observe nothing inside; changes of the buffers do not count as updates."""
        self._catch_up()
        with pause_hooks(self._shapes.hooks, *self._training_hooks, *self.evaluations.hooks):
            yield
        self.batches.forget_changes()

    def history(self, *, is_settled: bool, overhead: Overhead | None = None) -> History:
        """Return everything observed so far.

        Args:
            is_settled: Whether the statistics are used without a further update.
            overhead: What watching cost.
        """
        self._catch_up()
        self.follow_model()
        if self.steps == 0:
            # A loop whose steps are not noticed changes the buffers too.
            self.batches.forget_changes()
        readings = self.batches.readings()
        is_poisoned = any(reading.poisoned_step is not None for reading in readings.values())
        if is_poisoned and not self._is_closed:
            self._origin.begin()
        owned = self._trained_by.owned_parameters()
        evaluations, gap = self.evaluations, self.evaluations.gap
        run = Run(
            steps=self.steps,
            planned_steps=self._planned_steps,
            is_settled=is_settled,
            mode_gap=gap if isinstance(gap, ModeGap) else None,
            mode_gap_reason=gap if isinstance(gap, str) else "",
            earlier_mode_gaps=evaluations.earlier_gaps,
            mode_gap_in_training=evaluations.gap_in_training,
            origin=self._origin.origin,
            inputs=self._samples.window(),
            bad_input_step=self._entrance.first_bad_step(),
            plan=self._plan,
            steps_in_eval_mode=self._steps_in_eval_mode,
            longest_in_eval_mode=self._longest_in_eval_mode,
            has_new_weights_in_evaluation=evaluations.has_new_weights,
            unknown=self._unknown.found(),
            is_adversarial=self._entrance.is_fed_by_network or self._trained_by.are_several,
            is_optimized=self._trained_by.trains(self.model) if owned else None,
            overhead=overhead,
            is_adaptation=self._trained_by.trains_affine_only(self.layers),
        )
        return History(layers=tuple(self._describe_layers(run)), run=run)

    def _catch_up(self) -> None:
        """Take the buffers as they are, if the newest steps were passed over."""
        if self._pause is not None and not self._is_closed:
            self.batches.skip_to(self._step)

    def close(self) -> None:
        """Remove the hooks; the observations stay."""
        self._catch_up()
        self._is_closed = True
        self._shapes.wake()
        self._unknown.end_look()
        for hooks in self._all_hooks:
            hooks.close()
        self.evaluations.close()

    def _raise_errors(self) -> None:
        """Raise the first error of a hook, which did not end the user's forward."""
        if Hooks.errors == self._errors_before:
            return
        for hooks in self._all_hooks:
            hooks.raise_error()

    @property
    def _all_hooks(self) -> tuple[Hooks, ...]:
        others = (self._shapes.hooks, self._other_writes, *self.evaluations.hooks)
        return (*others, *self._training_hooks)

    @property
    def _training_hooks(self) -> tuple[Hooks, ...]:
        """The hooks for training only, without the cheap ones on shapes."""
        return (
            self._unknown.hooks,
            self.batches.hooks,
            self._streams.hooks,
            self._entrance.hooks,
            self._followers.hooks,
            self.evaluations.training_hooks,
            self._origin.hooks,
        )

    def _describe_layers(self, run: Run) -> Iterator[LayerHistory]:
        described, readings = describe_layers(self.model), self.batches.readings()
        evaluated = {**self._followers.windows(self._step), **self.evaluations.windows}
        owned = self._trained_by.owned_parameters()
        fed = self._trained_by.fed_by_trained(self.model, self.layers)
        for layer in self.layers:
            name = layer.name
            if name not in described:
                continue
            now, start, reading = described[name], self._at_start.get(name), readings.get(name)
            shapes = self._shapes.records[name]
            counts = shapes.values_per_channel()
            is_affine_frozen = self._trained_by.is_affine_frozen(layer, owned)
            was_frozen = None if start is None else start.is_affine_frozen
            is_written = start is not None and _has_other_affine(now, start)
            is_left_out = self._trained_by.is_left_out(layer, owned)
            # A copied counter counts the updates of another layer.
            is_copied = is_written and not counts and (bool(now.is_affine_frozen) or is_left_out)
            yield dataclasses.replace(
                now,
                is_affine_frozen=is_affine_frozen,
                is_affine_frozen_at_start=self._trained_by.left_out_at_start(layer) or was_frozen,
                is_held_at_start=start is not None and start.is_held_at_start,
                is_dropped=now.is_dropped
                or (now.running is None and start is not None and start.running is not None),
                is_left_out=now.is_affine_frozen is False and is_left_out,
                has_moving_weights=name in fed
                or (is_written and bool(is_affine_frozen and was_frozen)),
                is_following=layer in self._followers.layers,
                weight_decay=self._trained_by.weight_decay(layer),
                position=shapes.position,
                # As they are now: something may have written to them since the newest step.
                running=None if reading is None else now.running,
                running_at_start=None if start is None else start.running,
                # A copied counter counts the updates of another layer.
                updates_seen=0
                if reading is None or (is_copied and is_written)
                else reading.updates,
                source=self.batches.source(name),
                calls=dataclasses.replace(shapes.calls, in_training=sum(counts.values())),
                streams=self._streams.streams(name),
                without_grad=self._streams.without_grad(name),
                samples=shapes.samples(),
                values_per_channel=counts,
                batch_of_one_step=shapes.batch_of_one_step,
                poisoned_step=None if reading is None else reading.poisoned_step,
                restored_updates=0 if reading is None else reading.restored_updates,
                window=self.batches.window(name),
                evaluated=evaluated.get(name),
                view=None if self._views is None else self._views.measured.get(name),
                run=run,
            )

    def _choose_sources(self) -> None:
        """Choose from the calls seen so far where the batch statistics of a layer are read."""
        self.batches.choose_sources(
            {layer.name: self._shapes.records[layer.name].repeats() for layer in self.layers}
        )

    def _follow_entrance(self) -> None:
        """Watch the inputs of the modules around the layer that is called first."""
        if self.layers:
            positions = {name: record.position for name, record in self._shapes.records.items()}
            first = min(self.layers, key=lambda layer: positions[layer.name] or 0)
            self._entrance.follow(first.module)

    def _watch_other_writes(self) -> None:
        """Notice what does not come from training: a state dict, and what DDP broadcasts.

        On ranks other than 0, DDP writes to the buffers before a forward.
        """
        self._other_writes.close()
        for layer in self.layers:
            self._other_writes.after_loading(layer.module, partial(self._note_loading, layer))
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            inner = next(module for module in self.model.modules() if not is_wrapper(module))
            self._other_writes.before_outermost([inner], self._note_broadcast)

    def _note_broadcast(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self._pause is None:
            self.batches.forget_changes()

    def _note_loading(self, layer: BatchNormLayer, incompatible_keys: object) -> None:
        """Do not take what was loaded into a layer for an update of training."""
        self.batches.forget_changes()
        self._is_loaded = True
        start = self._at_start.get(layer.name)
        running = running_statistics(layer.running_mean, layer.running_var, layer.counter)
        if self.steps == 0 and start is not None and running is not None:
            self._at_start[layer.name] = dataclasses.replace(start, running=running)
            self._trained_by.note_start(layer, self._trained_by.owned_parameters())


def _find_held_among_others(model: nn.Module, layers: Iterable[BatchNormLayer]) -> set[str]:
    """Return the layers in eval mode, unlike modules next to them that hold no layer, by name."""
    known = {layer.module: layer for layer in layers}
    held: set[str] = set()
    for parent in model.modules():
        found = [known[child] for child in parent.children() if child in known]
        names = {layer.name for layer in found if layer.has_modes and not layer.is_training}
        if names and any(
            child.training and known.keys().isdisjoint(child.modules())
            for child in parent.children()
        ):
            held |= names
    return held


def _has_other_affine(now: LayerHistory, start: LayerHistory) -> bool:
    """Return whether gamma or beta differ from those of the start."""
    pairs = ((now.gamma, start.gamma), (now.beta, start.beta))
    return any(a is not None and b is not None and not np.array_equal(a, b) for a, b in pairs)


def _places_of(layers: Iterable[BatchNormLayer]) -> list[tuple[object, ...]]:
    """Return what the probes depend on: the modules, and the kind of their buffers."""
    places: list[tuple[object, ...]] = []
    for layer in layers:
        mean = layer.running_mean
        kind = None if mean is None else (mean.shape, mean.dtype, mean.device)
        places.append((layer.name, layer.module, kind))
    return places
