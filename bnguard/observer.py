"""Observes the BN layers of a model: owns the probes, and condenses what they read."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from bnguard.history import (
    BatchWindow,
    EvalWindow,
    History,
    LayerHistory,
    ModeGap,
    Run,
    Stream,
)
from bnguard.layers import BatchNormLayer, find_layers
from bnguard.preflight import Plan
from bnguard.probes.broadcasts import BroadcastProbe
from bnguard.probes.buffers import BufferProbe, imprecision
from bnguard.probes.evaluation import EvalProbe
from bnguard.probes.gap import GapProbe
from bnguard.probes.hooks import Hooks, paused
from bnguard.probes.inputs import InputProbe
from bnguard.probes.modules import describe_layers, running_statistics
from bnguard.probes.origin import OriginProbe
from bnguard.probes.row import BufferReading
from bnguard.probes.samples import SampleProbe
from bnguard.probes.shapes import ShapeProbe
from bnguard.probes.streams import StreamProbe

_VERSION = operator.attrgetter("_version")

# Mode gaps that are kept beside the newest, to tell a gap that lasts from one that passes.
_MAX_EARLIER_GAPS = 4


class Observer:
    """Tells the probes when a step is done, and the history what they read.

    Args:
        model: The model; left as it is, but for hooks that :meth:`close` takes off.
        optimizers: What trains the model, as far as that is known.
        eval_batches: Forward calls a layer that are read in each evaluation.
        planned_steps: Steps that training will take in all, None where that is not known.
        plan: What loader and trainer say of the training before its first batch.
        restore_poisoned: Put the last finite statistics back in the step that poisons them.
        on_batch_of_one: Called with the name of a layer before it meets its first batch with one
            value per channel.
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
        self._model = model
        self._optimizers = tuple(optimizers)
        self._eval_batches = eval_batches
        self._planned_steps = planned_steps
        self._plan = plan
        self._steps_in_eval_mode = 0
        self._weights_version = 0
        self._has_new_weights = False
        self._on_batch_of_one = on_batch_of_one
        self._step = 0
        self._batch_of_one_steps: dict[str, int] = {}
        self._full_windows: dict[str, BatchWindow] = {}
        self._evaluated: dict[str, EvalWindow] = {}
        self._gap: ModeGap | str = Run().mode_gap_reason
        self._earlier_gaps: tuple[ModeGap, ...] = ()
        self._origin: OriginProbe | None = None

        self._buffers = BufferProbe(self.layers, restore_poisoned=restore_poisoned)
        self._shapes = ShapeProbe(model, self.layers, self._note_batch_of_one)
        self._broadcasts = BroadcastProbe(model, self._buffers.forget_changes)
        self._evaluation_hooks: tuple[Hooks, ...] = ()
        self._inputs = InputProbe(())
        self._streams = StreamProbe(self._shapes)
        self._samples = SampleProbe(model)
        self._reasons: dict[str, str] = {}
        self._repeats: dict[str, int] = {}
        self._at_start = self._buffers.readings()
        owned = self._owned_parameters()
        # Only those that no optimizer has may be frozen by standing still.
        self._affine_at_start = {
            layer.name: [parameter.detach().clone() for parameter in _affine(layer)]
            for layer in self.layers
            if owned and not any(id(parameter) in owned for parameter in _affine(layer))
        }
        self._described_at_start = describe_layers(model)
        self._parameters = _versioned(model)
        self._places = self._places_of(self.layers)
        self._choose_sources()

    def step(self, step: int) -> None:
        """Read what the training step just taken, number ``step``, left in the buffers."""
        self._raise_errors()
        self._step = step
        self.steps += 1
        self._steps_in_eval_mode += not self._model.training
        self._weights_version = self._version_of_weights()
        self._shapes.step = step + 1
        if self._origin is not None:
            self._origin.step = step + 1
        self._buffers.read(step)
        if self.steps == 1:
            self.follow_model()

    def follow_model(self) -> None:
        """Notice layers that were added, removed or converted, and calls that need another probe.

        It walks through the modules of the model, so that it is done now and then.
        """
        if self._is_closed:
            return
        self._parameters = _versioned(self._model)
        layers = find_layers(self._model)
        places = self._places_of(layers)
        if places != self._places:
            self.layers, self._places = layers, places
            self._buffers.follow(layers)
            self._shapes.follow(layers)
            self._forget_other_sizes()
            self._read_from_calls({})
        self._streams.follow(
            layer for layer in layers if self._shapes.records[layer.name].most_calls_in_step > 1
        )
        self._choose_sources()

    def start_window(self) -> None:
        """Begin a new window of batch statistics, and keep the one that ends as the newest full."""
        for name, reading in self._buffers.readings().items():
            if reading.window is not None:
                self._full_windows[name] = reading.window
        self._buffers.start_window()
        self._samples.start_window()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Read what arrives at the layers in eval mode, and then measure the mode gap."""
        self.follow_model()
        moments = EvalProbe(self.layers, self._eval_batches)
        gap = GapProbe(self._model, self.layers)
        self._evaluation_hooks = (moments.hooks, gap.hooks)
        trained = self._affine_values()
        self._shapes.is_evaluating = True
        try:
            with paused(*self._training_hooks):
                yield
            self._raise_errors()
            self._has_new_weights = self.steps > 0 and (
                self._version_of_weights() != self._weights_version
                # A swap of averaged weights through .data leaves the versions as they are.
                or not all(map(torch.equal, self._affine_values(), trained))
            )
            moments.hooks.close()
            gap.hooks.close()
            self._keep(moments)
            with paused(self._shapes.hooks, *self._training_hooks):
                if isinstance(self._gap, ModeGap):
                    self._earlier_gaps = (*self._earlier_gaps, self._gap)[-_MAX_EARLIER_GAPS:]
                self._gap = gap.measure()
        finally:
            self._shapes.is_evaluating = False
            moments.hooks.close()
            gap.close()
            self._buffers.forget_changes()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Note nothing inside, and take the buffers as they are at the end."""
        with paused(self._shapes.hooks, *self._training_hooks, *self._evaluation_hooks):
            yield
        self._buffers.forget_changes()

    def forget_changes(self) -> None:
        """Take the buffers as they are now, whatever changed them since the newest step."""
        self._buffers.forget_changes()

    def windows(self) -> dict[str, BatchWindow]:
        """Return the window of batch statistics that each layer is judged by."""
        readings = self._buffers.readings()
        windows = {
            layer.name: self._window(layer.name, readings.get(layer.name)) for layer in self.layers
        }
        return {name: window for name, window in windows.items() if window is not None}

    def resume(self, windows: Mapping[str, BatchWindow]) -> None:
        """Go on from the windows of an interrupted run, until newer ones are full."""
        self._full_windows.update(windows)

    def history(self, *, is_settled: bool) -> History:
        """Return what was observed so far.

        Args:
            is_settled: Whether the statistics are to be judged as they are now, with no further
                update before they are used.
        """
        self.follow_model()
        readings = self._buffers.readings()
        self._look_for_origin(readings)
        run = Run(
            steps=self.steps,
            planned_steps=self._planned_steps,
            is_settled=is_settled,
            mode_gap=self._gap if isinstance(self._gap, ModeGap) else None,
            mode_gap_reason=self._gap if isinstance(self._gap, str) else "",
            earlier_mode_gaps=self._earlier_gaps,
            origin=None if self._origin is None else self._origin.origin,
            inputs=self._samples.window(),
            plan=self._plan,
            steps_in_eval_mode=self._steps_in_eval_mode,
            has_new_weights_in_evaluation=self._has_new_weights,
        )
        owned = self._owned_parameters()
        described = describe_layers(self._model)
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
        for hooks in (self._shapes.hooks, self._broadcasts.hooks, *self._training_hooks):
            hooks.close()

    def _raise_errors(self) -> None:
        """Raise here, where a caller can take it, what a hook had to keep from the forward."""
        for hooks in (self._shapes.hooks, *self._training_hooks, *self._evaluation_hooks):
            hooks.raise_error()

    @property
    def _training_hooks(self) -> list[Hooks]:
        """The hooks, but for the cheap ones on shapes, that look at training and nothing else."""
        hooks = [self._inputs.hooks, self._streams.hooks, self._samples.hooks]
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
        return dataclasses.replace(
            described,
            is_affine_frozen=self._is_affine_frozen(layer, owned),
            is_affine_frozen_at_start=self._was_affine_frozen(layer, described_at_start),
            weight_decay=self._weight_decay(layer),
            position=shapes.position,
            running=None if reading is None else reading.running,
            running_at_start=None if start is None else start.running,
            updates_seen=0 if reading is None else reading.updates,
            source=self._source(layer.name),
            calls_in_training=sum(counts.values()),
            calls_without_grad=shapes.calls_without_grad,
            calls_outside=shapes.calls_outside,
            calls_recomputed=shapes.calls_recomputed,
            calls_in_evaluation=shapes.calls_in_evaluation,
            steps_without_grad=shapes.steps_without_grad,
            frozen_calls=shapes.frozen_calls,
            frozen_calls_after=shapes.frozen_calls_after,
            unfrozen_step=shapes.unfrozen_step,
            calls_per_forward=shapes.most_calls,
            streams=tuple(
                Stream(mean=mean, var_unbiased=var, batches=batches)
                for (mean, var), batches in (
                    (values.cpu().numpy(), batches)
                    for values, batches in self._streams.streams(layer.name)
                )
            ),
            samples=shapes.samples(),
            values_per_channel=counts,
            batch_of_one_step=self._batch_of_one_steps.get(layer.name),
            poisoned_step=None if reading is None else reading.poisoned_step,
            restored_updates=0 if reading is None else reading.restored_updates,
            window=self._window(layer.name, reading),
            evaluated=self._evaluated.get(layer.name),
            run=run,
        )

    def _owned_parameters(self) -> set[int]:
        """Return the identities of the parameters that an optimizer has."""
        return {
            id(parameter)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def _is_affine_frozen(self, layer: BatchNormLayer, owned: set[int]) -> bool | None:
        parameters = _affine(layer)
        if not parameters:
            return None
        if not any(parameter.requires_grad for parameter in parameters):
            return True
        if not owned or any(id(parameter) in owned for parameter in parameters):
            return False
        at_start = self._affine_at_start.get(layer.name, [])
        return len(at_start) == len(parameters) and all(map(_is_same, parameters, at_start))

    def _was_affine_frozen(
        self, layer: BatchNormLayer, described: LayerHistory | None
    ) -> bool | None:
        """Return whether the affine parameters could not learn when watching began."""
        if self._affine_at_start.get(layer.name):
            return True
        return None if described is None else described.is_affine_frozen

    def _weight_decay(self, layer: BatchNormLayer) -> float | None:
        """Return the largest weight decay on gamma or beta; None where no optimizer has them."""
        own = {id(parameter) for parameter in _affine(layer)}
        decays = [
            float(group.get("weight_decay", 0.0))
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            if any(id(parameter) in own for parameter in group["params"])
        ]
        return max(decays, default=None)

    def _affine_values(self) -> list[Tensor]:
        return [part.detach().clone() for layer in self.layers for part in _affine(layer)]

    def _version_of_weights(self) -> int:
        """Return a number that rises whenever a weight is written to in place."""
        return sum(map(_VERSION, self._parameters))

    def _window(self, name: str, reading: BufferReading | None) -> BatchWindow | None:
        """Return the newest window that holds at least half of the batches of a full one."""
        newest, full = None if reading is None else reading.window, self._full_windows.get(name)
        if newest is None or full is None:
            return newest or full
        return newest if 2 * newest.batches.max() >= full.batches.max() else full

    def _keep(self, probe: EvalProbe) -> None:
        # Those of the layers, since averaged weights are evaluated with statistics of their own.
        layers = {layer.name: layer for layer in self.layers}
        for name, reading in probe.readings().items():
            layer = layers[name]
            running = running_statistics(layer.running_mean, layer.running_var, layer.counter)
            if running is None or reading.moments.count < 2:
                continue
            self._evaluated[name] = EvalWindow(
                count=reading.moments.count,
                batches=reading.calls,
                nonfinite_batches=reading.nonfinite_calls,
                mean=reading.moments.mean.cpu().numpy(),
                var_unbiased=reading.moments.var_unbiased.cpu().numpy(),
                largest_normalised_std=reading.largest_normalised,
                padding_share=reading.padding_share,
                padding_spread=reading.padding_spread,
                dtype=reading.dtype,
                running=running,
                step=self._step,
            )

    def _choose_sources(self) -> None:
        """Read layers from their calls where their buffers do not tell their batches."""
        repeats = {layer.name: self._shapes.records[layer.name].repeats() for layer in self.layers}
        if repeats != self._repeats:
            self._repeats = repeats
            self._buffers.use_repeats(repeats)
        readings = self._buffers.readings()
        reasons = {}
        for layer in self.layers:
            reading = readings.get(layer.name)
            reason = None if reading is None else imprecision(layer, reading.running.updates or 0)
            if reason is not None:
                reasons[layer.name] = reason
        if reasons.keys() != self._reasons.keys():
            self._read_from_calls(reasons)

    def _read_from_calls(self, reasons: dict[str, str]) -> None:
        """Read the layers with these names from their calls, for these reasons."""
        self._reasons = reasons
        self._inputs.hooks.close()
        self._inputs = InputProbe(layer for layer in self.layers if layer.name in reasons)
        self._buffers.take_from(dict.fromkeys(reasons, self._inputs))

    def _source(self, layer: str) -> str:
        """Return where the batch statistics of a layer are read, and why not from its buffers."""
        reason = self._reasons.get(layer)
        return "buffers" if reason is None else f"{self._inputs.place(layer)}: {reason}"

    def _places_of(self, layers: Iterable[BatchNormLayer]) -> list[tuple[object, ...]]:
        """Return what has to be followed anew when it changes: the modules, and their buffers."""
        places: list[tuple[object, ...]] = []
        for layer in layers:
            mean = layer.running_mean
            kind = None if mean is None else (mean.shape, mean.dtype, mean.device)
            places.append((layer.name, layer.module, kind))
        return places

    def _forget_other_sizes(self) -> None:
        """Forget what was seen of layers in whose place one with other channels stands now."""
        channels = {layer.name: layer.channels for layer in self.layers}
        for kept in (self._full_windows, self._evaluated):
            for name in [name for name in kept if len(kept[name].mean) != channels.get(name)]:
                del kept[name]

    def _look_for_origin(self, readings: dict[str, BufferReading]) -> None:
        """Once statistics were poisoned, wait for the next bad forward and see where it begins."""
        if self._is_closed or self._origin is not None:
            return
        if any(reading.poisoned_step is not None for reading in readings.values()):
            self._origin = OriginProbe(self._model, self._step + 1)

    def _note_batch_of_one(self, name: str) -> None:
        """Tell at once, since PyTorch is about to refuse the batch without naming the layer."""
        self._batch_of_one_steps.setdefault(name, self._step + 1)
        self._on_batch_of_one()


def _affine(layer: BatchNormLayer) -> list[Tensor]:
    return [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]


def _versioned(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that count how often they were written to; inference tensors do not."""
    return [
        parameter
        for parameter in model.parameters()
        if not (is_lazy(parameter) or parameter.is_inference())
    ]


def _is_same(now: Tensor, before: Tensor) -> bool:
    return now.shape == before.shape and torch.equal(now.detach().to(before), before)
