"""Observes the BN layers of a model: owns the probes, and condenses what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
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
from bnguard.probes.buffers import BufferProbe, BufferReading, imprecision
from bnguard.probes.evaluation import EvalProbe
from bnguard.probes.gap import GapProbe
from bnguard.probes.inputs import InputProbe
from bnguard.probes.origin import OriginProbe
from bnguard.probes.shapes import ShapeProbe


class Observer:
    """Tells the probes when a step is done, and the history what they read.

    Args:
        model: The model; left as it is, but for hooks that :meth:`close` takes off.
        optimizers: What trains the model, as far as that is known.
        eval_batches: Forward calls a layer that are read in each evaluation.
        planned_steps: Steps that training will take in all, None where that is not known.
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
        restore_poisoned: bool,
        on_batch_of_one: Callable[[], None],
    ) -> None:
        self.layers = find_layers(model)
        self.steps = 0
        self._model = model
        self._optimizers = tuple(optimizers)
        self._eval_batches = eval_batches
        self._planned_steps = planned_steps
        self._on_batch_of_one = on_batch_of_one
        self._step = 0
        self._batch_of_one_steps: dict[str, int] = {}
        self._full_windows: dict[str, BatchWindow] = {}
        self._evaluated: dict[str, EvalWindow] = {}
        self._gap: ModeGap | str = Run().mode_gap_reason
        self._origin: OriginProbe | None = None

        self._buffers = BufferProbe(self.layers, restore_poisoned=restore_poisoned)
        self._shapes = ShapeProbe(model, self.layers, self._note_batch_of_one)
        self._inputs = InputProbe((), self._shapes)
        self._sources: dict[str, str] = {}
        self._at_start = self._buffers.readings()
        self._affine_at_start = {
            layer.name: [parameter.detach().clone() for parameter in _affine(layer)]
            for layer in self.layers
        }
        self._choose_sources()

    def step(self, step: int) -> None:
        """Read what the training step just taken, number ``step``, left in the buffers."""
        self._step = step
        self.steps += 1
        self._buffers.read(step)
        if self.steps == 1:
            self.follow_model()

    def follow_model(self) -> None:
        """Notice layers that were added, removed or converted, and calls that need another probe.

        To be called now and then: it walks through the modules of the model.
        """
        layers = find_layers(self._model)
        if [layer.module for layer in layers] != [layer.module for layer in self.layers]:
            self.layers = layers
            self._buffers.follow(layers)
            self._shapes.follow(layers)
        self._choose_sources()

    def start_window(self) -> None:
        """Begin a new window of batch statistics, and keep the one that ends as the newest full."""
        for name, reading in self._buffers.readings().items():
            if reading.window is not None:
                self._full_windows[name] = reading.window
        self._buffers.start_window()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Read what arrives at the layers in eval mode, and then measure the mode gap."""
        moments = EvalProbe(self.layers, self._eval_batches)
        gap = GapProbe(self._model, self.layers)
        try:
            yield
            moments.hooks.close()
            gap.hooks.close()
            self._keep(moments)
            with self._shapes.hooks.paused(), self._inputs.hooks.paused():
                self._gap = gap.measure()
        finally:
            moments.hooks.close()
            gap.close()
            self._buffers.forget_changes()

    def history(self, *, is_settled: bool) -> History:
        """Return what was observed so far.

        Args:
            is_settled: Whether the statistics are to be judged as they are now, with no further
                update before they are used.
        """
        readings = self._buffers.readings()
        self._look_for_origin(readings)
        run = Run(
            steps=self.steps,
            planned_steps=self._planned_steps,
            is_settled=is_settled,
            mode_gap=self._gap if isinstance(self._gap, ModeGap) else None,
            mode_gap_reason=self._gap if isinstance(self._gap, str) else "",
            origin=None if self._origin is None else self._origin.origin,
        )
        owned = {
            id(parameter)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        return History(
            layers=tuple(
                self._layer_history(layer, readings.get(layer.name), owned, run)
                for layer in self.layers
            ),
            run=run,
        )

    def close(self) -> None:
        """Take the hooks off; what was observed stays."""
        self._shapes.hooks.close()
        self._inputs.hooks.close()
        if self._origin is not None:
            self._origin.hooks.close()

    def _layer_history(
        self, layer: BatchNormLayer, reading: BufferReading | None, owned: set[int], run: Run
    ) -> LayerHistory:
        shapes = self._shapes.records[layer.name]
        counts = shapes.values_per_channel()
        start = self._at_start.get(layer.name)
        return LayerHistory(
            name=layer.name,
            kind=type(layer.module).__name__,
            channels=layer.channels,
            eps=layer.eps,
            momentum=layer.momentum,
            training=layer.is_training,
            is_affine_frozen=self._is_affine_frozen(layer, owned),
            running=None if reading is None else reading.running,
            running_at_start=None if start is None else start.running,
            updates_seen=0 if reading is None else reading.updates,
            source=self._sources.get(layer.name, "buffers"),
            calls_in_training=sum(counts.values()),
            calls_without_grad=shapes.calls_without_grad,
            calls_outside=shapes.calls_outside,
            calls_per_forward=shapes.most_calls,
            streams=tuple(
                Stream(mean=mean, var_unbiased=var)
                for mean, var in (part.cpu().numpy() for part in self._inputs.streams(layer.name))
            ),
            samples=shapes.samples(),
            values_per_channel=counts,
            batch_of_one_step=self._batch_of_one_steps.get(layer.name),
            poisoned_step=None if reading is None else reading.poisoned_step,
            restored_updates=0 if reading is None else reading.restored_updates,
            has_finite_affine=all(bool(part.isfinite().all()) for part in _affine(layer)),
            window=self._window(layer.name, reading),
            evaluated=self._evaluated.get(layer.name),
            run=run,
        )

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

    def _window(self, name: str, reading: BufferReading | None) -> BatchWindow | None:
        """Return the newest window that holds at least half of the batches of a full one."""
        newest, full = None if reading is None else reading.window, self._full_windows.get(name)
        if newest is None or full is None:
            return newest or full
        return newest if 2 * newest.batches.max() >= full.batches.max() else full

    def _keep(self, probe: EvalProbe) -> None:
        running = self._buffers.readings()
        for name, reading in probe.readings().items():
            if name not in running or reading.moments.count < 2:
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
                running=running[name].running,
                step=self._step,
            )

    def _choose_sources(self) -> None:
        """Read layers from their inputs where their buffers do not tell their batches."""
        reasons = {}
        for layer in self.layers:
            reason = imprecision(layer)
            calls = self._shapes.records[layer.name].most_calls
            if reason is None and calls > 1:
                reason = f"{calls} calls in a forward are blended"
            if reason is not None and layer.is_tracking:
                reasons[layer.name] = f"inputs: {reason}"
        if reasons.keys() != self._sources.keys():
            self._inputs.hooks.close()
            chosen = [layer for layer in self.layers if layer.name in reasons]
            self._inputs = InputProbe(chosen, self._shapes)
            self._buffers.take_from(dict.fromkeys(reasons, self._inputs))
        self._sources = reasons

    def _look_for_origin(self, readings: dict[str, BufferReading]) -> None:
        """Once statistics were poisoned, wait for the next bad forward and see where it begins."""
        if self._origin is None and any(
            reading.poisoned_step is not None for reading in readings.values()
        ):
            self._origin = OriginProbe(self._model)

    def _note_batch_of_one(self, name: str) -> None:
        """Tell at once, since PyTorch is about to refuse the batch without naming the layer."""
        self._batch_of_one_steps.setdefault(name, self._step + 1)
        self._on_batch_of_one()


def _affine(layer: BatchNormLayer) -> list[Tensor]:
    return [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]


def _is_same(now: Tensor, before: Tensor) -> bool:
    return now.shape == before.shape and torch.equal(now.detach().to(before), before)
