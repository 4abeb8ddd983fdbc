"""The observer of a model: owns the probes, and condenses their readings to a history."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from bnguard.layers.bn_layer import BatchNormLayer, find_layers, is_wrapper
from bnguard.layers.distances import FloatArray
from bnguard.observe.batch_statistics import BatchProbe, StreamProbe, fitting
from bnguard.observe.eval_statistics import EvalProbe, drops_values
from bnguard.observe.history import EvalWindow, History, LayerHistory, ModeGap, Run
from bnguard.observe.hooks import Hooks, paused
from bnguard.observe.layer_calls import ShapeProbe, SkipProbe
from bnguard.observe.mode_gap import GapProbe
from bnguard.observe.model_inputs import Entrance, FinitenessProbe, SampleProbe
from bnguard.observe.model_state import describe_layers, running_statistics
from bnguard.observe.nan_origin import OriginProbe
from bnguard.observe.running_buffers import BufferReading
from bnguard.observe.trained_parameters import OptimizerProbe, WeightProbe
from bnguard.observe.training_plan import Plan
from bnguard.observe.training_views import ViewProbe
from bnguard.observe.unknown_layers import UnknownProbe

# Mode gaps kept next to the newest, to distinguish a lasting gap from a passing one.
_MAX_EARLIER_GAPS = 4

# Names of gamma and beta.
_AFFINE = ("weight", "bias", "gamma", "beta")

# A smaller change harms no network, so that nobody asks whether the data make it.
_LARGE_GAP = 0.3

# Of running statistics that can be read without a copy.
_NUMPY_DTYPES = (torch.float16, torch.float32, torch.float64)


class Observer:
    """Reads the BN layers of a model after each step and in each evaluation.

    :meth:`close` removes the hooks, and nothing else of the model changes. The arguments are those
    of :func:`bnguard.watch`, and a function called before a layer's first batch with one value per
    channel.

    Attributes:
        layers: The BN layers of the model.
        batches: The batch statistics of the layers.
        steps: Training steps observed.
        is_pausing: Whether the newest steps were passed over.
        steps_left_out: Training steps that were passed over.
        evaluations_left_out: Evaluations that were passed over.
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
        self.layers = find_layers(model)
        self.steps = self.steps_left_out = self.evaluations_left_out = 0
        self.is_pausing = False
        self._pause = ExitStack()
        self._last: FloatArray | None = None
        self._errors_before = Hooks.errors
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
        self._views = views
        self._step = 0
        self._batch_of_one_steps: dict[str, int] = {}
        self._evaluated: dict[str, EvalWindow] = {}
        self._gap: ModeGap | str = Run().mode_gap_reason
        self._earlier_gaps: tuple[ModeGap, ...] = ()
        self._gap_in_training: ModeGap | None = None
        self._origin: OriginProbe | None = None
        self._following: dict[str, EvalWindow] = {}
        self._followers: tuple[BatchNormLayer, ...] = ()
        self._follower_probe = self._moments = EvalProbe(model, (), eval_batches)

        self.batches = BatchProbe(self.layers, restore_poisoned=restore_poisoned)
        self._shapes = ShapeProbe(model, self.layers, self._note_batch_of_one)
        self._broadcasts, self._loading = Hooks(), Hooks()
        self._watch_broadcasts()
        self._watch_loading()
        self._evaluation_hooks: tuple[Hooks, ...] = ()
        self._training_gap = GapProbe(model, self.layers, is_training=True)
        self._streams = StreamProbe(self._shapes)
        self._samples = SampleProbe(plan.accumulated_batches)
        self._finiteness = FinitenessProbe()
        self._unknown = UnknownProbe(model, self.layers)
        self._entrance = Entrance(model, [self._samples.note, self._finiteness.note])
        self._at_start = self.batches.readings()
        self._trained_by = OptimizerProbe(optimizers, self.layers)
        self._weights = WeightProbe(model, self.layers)
        self._described_at_start = describe_layers(model)
        known = {layer.module for layer in self.layers}
        self._held_at_start = {layer.name for layer in self.layers if _is_held(model, layer, known)}
        self._places = _places_of(self.layers)
        self._state_places = list(_state_places_of(self.layers))
        self._choose_sources()
        self._follow_entrance()

    def follow_optimizer(self, optimizer: Optimizer) -> None:
        """Count in an optimizer that trains the model from now on."""
        self._trained_by.follow(optimizer)

    def step(self, step: int) -> None:
        """Read the buffers after training step number ``step``."""
        self._raise_errors()
        self._unknown.end_look()
        self._count_step(step)
        if self.is_pausing:
            self._end_pause()
        else:
            self.batches.read(step)
        if self._views is not None:
            self._views.note_step(step, self.layers)
        if self.steps == 1:
            if self._is_loaded:
                self._weights.start_anew()
            self.follow_model()
            self._weights.note_places()

    def pass_over(self, step: int) -> None:
        """Count training step number ``step`` without reading the buffers, to save time.

        Unless it poisons the statistics of the last layer, as NaN and Inf in any layer do.
        """
        self._raise_errors()
        if not self.is_pausing:
            hooks = (self._entrance.hooks, self.batches.hooks, self._streams.hooks)
            self._pause.enter_context(paused(*hooks))
            self._last = self._value_of_last_layer()
            self.is_pausing = True
        before = self.steps
        self._count_step(step)
        self.steps_left_out += self.steps - before
        if self._last is not None and not math.isfinite(self._last[-1]):
            self._end_pause()

    def _end_pause(self) -> None:
        self._pause.close()
        self.is_pausing = False
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
        self._weights.note_step()
        self._shapes.start_step(step + 1)
        self._finiteness.step = step + 1
        self._samples.start_step()
        if self._origin is not None:
            self._origin.step = step + 1

    def follow_model(self) -> None:
        """Notice layers that were added, removed or converted, and calls that need another probe.

        Walks through all modules, so it should not run at every step.
        """
        if self._is_closed:
            return
        self._shapes.wake()
        layers = find_layers(self.model)
        self._weights.follow_model(layers)
        places = _places_of(layers)
        if places != self._places:
            self.layers, self._places = layers, places
            self.batches.follow(layers)
            self._shapes.follow(layers)
            self._training_gap.close()
            self._training_gap = GapProbe(self.model, layers, is_training=True)
            self._watch_loading()
            self._evaluated = fitting(self._evaluated, layers)
        self._state_places = list(_state_places_of(layers))
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
        """Begin a new window of batch statistics and keep the old one as the newest full one."""
        self.batches.start_window()
        self._samples.start_window()
        self._weights.note_places()
        self._watch_followers()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Read the inputs of the layers in eval mode, then measure the mode gap."""
        self._catch_up()
        self.follow_model()
        if self._is_bystander is None and self.steps:
            self._is_bystander = self._was_never_called()
        moments = self._moments = EvalProbe(self.model, self.layers, self._eval_batches)
        self._evaluation_hooks = (moments.hooks,)
        held = self._held_in_eval_mode()
        gap = GapProbe(self.model, [layer for layer in self.layers if layer.name not in held])
        self._shapes.wake()
        left_out = SkipProbe(self.model, self.layers, self._shapes.records)
        self._evaluation_hooks = (moments.hooks, gap.hooks, left_out.hooks)
        self._weights.start_evaluation()
        self._shapes.is_evaluating = True
        try:
            with paused(*self._training_hooks):
                yield
            self._raise_errors()
            self._has_new_weights = self.steps > 0 and (
                self._weights.have_changed()
                # The weights of a copy are written while the model trains.
                or (bool(self._is_bystander) and self._weights.have_changed_since_start(self.model))
            )
            moments.hooks.close()
            gap.hooks.close()
            left_out.hooks.close()
            self._evaluated.update(
                (name, dataclasses.replace(window, is_held=name in held))
                for name, window in moments.windows(self._step).items()
            )
            with paused(self._shapes.hooks, *self._training_hooks):
                if isinstance(self._gap, ModeGap):
                    self._earlier_gaps = (*self._earlier_gaps, self._gap)[-_MAX_EARLIER_GAPS:]
                self._gap = gap.measure()
                self._gap_in_training = None
                if isinstance(self._gap, ModeGap) and self._gap.relative_change > _LARGE_GAP:
                    in_training = self._training_gap.measure(held)
                    self._gap_in_training = (
                        in_training if isinstance(in_training, ModeGap) else None
                    )
        finally:
            self._training_gap.start_anew()
            self._shapes.is_evaluating = False
            moments.hooks.close()
            left_out.hooks.close()
            gap.close()
            self.batches.forget_changes()

    def has_read_a_batch(self) -> bool:
        """Return whether the newest evaluation has as many values as a batch of training."""
        return any(
            window.count >= max(self._shapes.records[name].values_per_channel(), default=0)
            for name, window in self._moments.windows(self._step).items()
        )

    @contextmanager
    def pass_over_evaluation(self) -> Iterator[None]:
        """Read nothing of an evaluation, to save time; its writes to buffers are not updates."""
        self._catch_up()
        self.evaluations_left_out += 1
        self._evaluation_hooks = ()
        self._shapes.is_evaluating = True
        try:
            with paused(*self._training_hooks):
                yield
        finally:
            self._shapes.is_evaluating = False
            self.batches.forget_changes()

    def catch_up(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Read the call of a module in the midst of which an evaluation began."""
        for hooks in self._evaluation_hooks:
            hooks.catch_up(module, args, kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Observe nothing inside; changes of the buffers do not count as updates."""
        self._catch_up()
        with paused(self._shapes.hooks, *self._training_hooks, *self._evaluation_hooks):
            yield
        self.batches.forget_changes()

    def note_training(self) -> None:
        """Note that the loop goes on after a step, without an evaluation between."""
        self._weights.note_training()

    def is_dropping(self) -> bool:
        """Return whether dropout acts, as when several passes measure the uncertainty."""
        return any(module.training for module in self.model.modules() if drops_values(module))

    def state_now(self) -> tuple[object, ...]:
        """Return what changes with any weight, or any statistic of the BN layers, cheaply.

        It is read at each forward of an evaluation.
        """
        tensors = [holder.get(name) for holder, name in self._state_places]
        versions = [
            (tensor._version, tensor.data_ptr())
            for tensor in tensors
            if isinstance(tensor, Tensor) and not (tensor.is_inference() or tensor.is_meta)
        ]
        return (self._weights.version_now(), versions)

    def history(self, *, is_settled: bool) -> History:
        """Return everything observed so far.

        Args:
            is_settled: Whether the statistics are used without a further update.
        """
        self._catch_up()
        self.follow_model()
        if self.steps == 0:
            # A loop whose steps are not noticed changes the buffers too.
            self.batches.forget_changes()
        readings = self.batches.readings()
        self._look_for_origin(readings)
        owned = self._trained_by.owned_parameters()
        run = Run(
            steps=self.steps,
            planned_steps=self._planned_steps,
            is_settled=is_settled,
            mode_gap=self._gap if isinstance(self._gap, ModeGap) else None,
            mode_gap_reason=self._gap if isinstance(self._gap, str) else "",
            earlier_mode_gaps=self._earlier_gaps,
            mode_gap_in_training=self._gap_in_training,
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
            is_adaptation=self._trained_by.trains_affine_only(self.layers),
        )
        described = describe_layers(self.model)
        fed = self._trained_by.fed_by_trained(self.model, self.layers)
        self._following.update(self._follower_probe.windows(self._step))
        return History(
            layers=tuple(
                dataclasses.replace(
                    self._layer_history(
                        layer, described[layer.name], readings.get(layer.name), owned, run
                    ),
                    is_fed_by_trained=layer.name in fed,
                )
                for layer in self.layers
                if layer.name in described
            ),
            run=run,
        )

    def _catch_up(self) -> None:
        """Take the buffers as they are, if the newest steps were passed over."""
        if self.is_pausing and not self._is_closed:
            self.batches.skip_to(self._step)

    def close(self) -> None:
        """Remove the hooks; the observations stay."""
        self._catch_up()
        self._is_closed = True
        self._shapes.wake()
        self._unknown.end_look()
        for hooks in self._all_hooks:
            hooks.close()
        self._training_gap.close()

    def _raise_errors(self) -> None:
        """Raise the first error of a hook, which did not end the user's forward."""
        if Hooks.errors == self._errors_before:
            return
        for hooks in self._all_hooks:
            hooks.raise_error()

    @property
    def _all_hooks(self) -> tuple[Hooks, ...]:
        always = (self._shapes.hooks, self._broadcasts, self._loading)
        return (*always, *self._training_hooks, *self._evaluation_hooks)

    @property
    def _training_hooks(self) -> list[Hooks]:
        """The hooks for training only, without the cheap ones on shapes."""
        hooks = [
            self._unknown.hooks,
            self.batches.hooks,
            self._streams.hooks,
            self._entrance.hooks,
            self._follower_probe.hooks,
            self._training_gap.hooks,
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
        was_frozen = None if described_at_start is None else described_at_start.is_affine_frozen
        # Never called in training, but gamma changes without learning: something writes to it.
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
            is_affine_frozen_at_start=self._trained_by.left_out_at_start(layer) or was_frozen,
            is_held_at_start=layer.name in self._held_at_start,
            is_dropped=described.is_dropped or (start is not None and described.running is None),
            is_left_out=described.is_affine_frozen is False
            and self._trained_by.is_left_out(layer, owned),
            weight_decay=self._trained_by.weight_decay(layer),
            position=shapes.position,
            # As they are now: something may have written to them since the newest step.
            running=None if reading is None else described.running,
            running_at_start=None if start is None else start.running,
            # A copied counter counts the updates of another layer.
            updates_seen=0 if reading is None or is_written else reading.updates,
            source=self.batches.source(layer.name),
            calls=dataclasses.replace(shapes.calls, in_training=sum(counts.values())),
            streams=self._streams.streams(layer.name),
            without_grad=self._streams.without_grad(layer.name),
            samples=shapes.samples(),
            values_per_channel=counts,
            batch_of_one_step=self._batch_of_one_steps.get(layer.name),
            poisoned_step=None if reading is None else reading.poisoned_step,
            restored_updates=0 if reading is None else reading.restored_updates,
            window=self.batches.window(layer.name),
            evaluated=self._evaluated.get(layer.name) or self._following.get(layer.name),
            is_following=layer in self._followers,
            view=None if self._views is None else self._views.measured.get(layer.name),
            run=run,
        )

    def _held_in_eval_mode(self) -> set[str]:
        """Return the layers that the newest training step called in eval mode only."""
        if not self.steps:
            return set()
        return {
            layer.name
            for layer in self.layers
            if self._shapes.records[layer.name].is_held_in_eval_mode(self._shapes.step - 1)
        }

    def _was_never_called(self) -> bool:
        """Return whether no training batch reached the model, as if it were a copy of another."""
        return not self._trained_by.trains(self.model) and all(
            self._shapes.records[layer.name].position is None for layer in self.layers
        )

    def _find_followers(self) -> Iterator[BatchNormLayer]:
        """Yield layers whose weights something writes, but whose statistics stay as at the start.

        A teacher or target network has them if only its parameters are copied.
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
            layers = [
                layer
                for layer in self.layers
                if layer.module in modules
                and not self._shapes.records[layer.name].values_per_channel()
            ]
            if layers and self._weights.have_changed_since_start(part):
                yield from filter(self._is_as_at_start, layers)

    def _is_as_at_start(self, layer: BatchNormLayer) -> bool:
        """Return whether a layer has the statistics of the start."""
        start = self._at_start.get(layer.name)
        running = running_statistics(layer.running_mean, layer.running_var, layer.counter)
        if start is None or running is None:
            return False
        return bool(
            np.array_equal(start.running.mean, running.mean)
            and np.array_equal(start.running.var, running.var)
        )

    def _watch_followers(self) -> None:
        """Start a new window of the inputs of followers while other parts train."""
        self._following.update(self._follower_probe.windows(self._step))
        self._follower_probe.hooks.close()
        self._follower_probe = EvalProbe(self.model, self._followers, self._eval_batches)

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

    def _look_for_origin(self, readings: dict[str, BufferReading]) -> None:
        """Once statistics are poisoned, find where NaN or Inf begins in the next bad forward."""
        if self._is_closed or self._origin is not None:
            return
        if any(reading.poisoned_step is not None for reading in readings.values()):
            self._origin = OriginProbe(self.model, self._step + 1)

    def _watch_broadcasts(self) -> None:
        """Ignore, on ranks other than 0, what DDP writes to the buffers before a forward."""
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            inner = next(module for module in self.model.modules() if not is_wrapper(module))
            self._broadcasts.before_outermost([inner], self._note_broadcast)

    def _note_broadcast(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if not self.is_pausing:
            self.batches.forget_changes()

    def _watch_loading(self) -> None:
        """Notice a state dict that is loaded into a layer, alone or with the model."""
        self._loading.close()
        for layer in self.layers:
            self._loading.after_loading(layer.module, partial(self._note_loading, layer))

    def _note_loading(self, layer: BatchNormLayer, incompatible_keys: object) -> None:
        """Do not take what was loaded into a layer for an update of training."""
        self.batches.forget_changes()
        self._is_loaded = True
        start = self._at_start.get(layer.name)
        running = running_statistics(layer.running_mean, layer.running_var, layer.counter)
        if self.steps == 0 and start is not None and running is not None:
            self._at_start[layer.name] = dataclasses.replace(start, running=running)
            self._trained_by.note_start(layer, self._trained_by.owned_parameters())

    def _note_batch_of_one(self, name: str) -> None:
        """Report at once, because PyTorch will reject the batch without naming the layer."""
        self._batch_of_one_steps.setdefault(name, self._step + 1)
        self._on_batch_of_one()


def _is_held(model: nn.Module, layer: BatchNormLayer, known: set[nn.Module]) -> bool:
    """Return whether a layer is in eval mode, unlike the modules next to it that hold no layer."""
    if layer.is_training or not layer.has_modes:
        return False
    around = model.get_submodule(layer.name.rpartition(".")[0])
    return any(child.training and known.isdisjoint(child.modules()) for child in around.children())


def _places_of(layers: Iterable[BatchNormLayer]) -> list[tuple[object, ...]]:
    """Return what the probes depend on: the modules, and the kind of their buffers."""
    places: list[tuple[object, ...]] = []
    for layer in layers:
        mean = layer.running_mean
        kind = None if mean is None else (mean.shape, mean.dtype, mean.device)
        places.append((layer.name, layer.module, kind))
    return places


def _state_places_of(layers: Iterable[BatchNormLayer]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield dictionary and key of gamma, beta, mean and variance, unless other ranks have parts."""
    for layer in layers:
        if layer.is_sharded:
            continue
        parameters = layer.module._parameters
        affine = [(parameters, name) for name in _AFFINE if name in parameters]
        mean, var, *_ = layer.statistics()
        for holder, name in (*affine, mean, var):
            values: Any = holder.get(name)
            if not is_lazy(values):
                yield holder, name
