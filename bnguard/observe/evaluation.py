"""What an evaluation shows: the inputs in eval mode, the mode gap, and layers that it skips."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import nn

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.observe.batch_statistics import fitting
from bnguard.observe.eval_statistics import EvalProbe
from bnguard.observe.gap_probe import GapProbe
from bnguard.observe.history import EvalWindow, ModeGap, Run
from bnguard.observe.hooks import Hooks
from bnguard.observe.layer_calls import ShapeProbe
from bnguard.observe.skipped_layers import SkipProbe
from bnguard.observe.trained_parameters import OptimizerProbe, WeightProbe

# Mode gaps kept next to the newest, to distinguish a lasting gap from a passing one.
_MAX_EARLIER_GAPS = 4

# A smaller change harms no network, so that nobody asks whether the data make it.
_LARGE_GAP = 0.3


class EvaluationProbe:
    """Reads the evaluations of a model, one after another.

    Args:
        model: The model.
        layers: Its BN layers.
        shapes: Their calls.
        trained_by: The optimizers of the model.
        weights: What writes to its weights.
        eval_batches: First batches that are read in each evaluation; of the rest ever fewer are.

    Attributes:
        windows: The inputs of each layer in its newest evaluation, by name.
        gap: The newest mode gap, or why it was not measured.
        earlier_gaps: Those before, the newest last.
        gap_in_training: That of training batches, if the newest is large.
        has_exchanged_weights: Whether the weights of the newest evaluation are gone.
        has_new_weights: As in :class:`bnguard.observe.history.Run`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[BatchNormLayer],
        shapes: ShapeProbe,
        trained_by: OptimizerProbe,
        weights: WeightProbe,
        eval_batches: int,
    ) -> None:
        self.windows: dict[str, EvalWindow] = {}
        self.gap: ModeGap | str = Run().mode_gap_reason
        self.earlier_gaps: tuple[ModeGap, ...] = ()
        self.gap_in_training: ModeGap | None = None
        self.has_new_weights = False
        self._model = model
        self._shapes = shapes
        self._trained_by = trained_by
        self._weights = weights
        self._eval_batches = eval_batches
        # Whether the model is a copy of another; unknown before the first evaluation.
        self._is_bystander: bool | None = None
        self.has_exchanged_weights = False
        self._began_with_new_weights = False
        self._held: set[str] = set()
        self._inputs = EvalProbe(model, (), eval_batches)
        self._gap_probe = GapProbe(model, ())
        self._skips = SkipProbe(model, (), {})
        self._training_gap_probe = GapProbe(model, layers, is_training=True)
        self._layers = layers

    @property
    def hooks(self) -> tuple[Hooks, ...]:
        """The hooks that read an evaluation."""
        return (self._inputs.hooks, self._gap_probe.hooks, self._skips.hooks)

    @property
    def training_hooks(self) -> Hooks:
        """The hooks that keep batches of training, to compare."""
        return self._training_gap_probe.hooks

    def follow(self, layers: Sequence[BatchNormLayer]) -> None:
        """Read these layers from now on, and keep what fits of earlier evaluations."""
        self._layers = layers
        self.windows = fitting(self.windows, layers)
        self._training_gap_probe.close()
        self._training_gap_probe = GapProbe(self._model, layers, is_training=True)

    def begin(self, steps: int) -> None:
        """Begin to read an evaluation after this many steps of training."""
        if self._is_bystander is None and steps:
            self._is_bystander = self._was_never_called()
        self._held = self._find_held_in_eval_mode() if steps else set()
        compared = [layer for layer in self._layers if layer.name not in self._held]
        self._inputs = EvalProbe(self._model, self._layers, self._eval_batches)
        self._gap_probe = GapProbe(self._model, compared)
        self._skips = SkipProbe(self._model, self._layers, self._shapes.records)
        self._weights.start_evaluation()
        self._began_with_new_weights = self._are_weights_new()
        self.has_exchanged_weights = False

    def note_exchanged_weights(self) -> None:
        """Note that the model has other weights again, so that it cannot be run once more."""
        self.has_exchanged_weights = True

    def end(self, step: int) -> None:
        """Condense what was read after a step, and run the model again for the mode gap."""
        self.has_new_weights = (
            self._began_with_new_weights if self.has_exchanged_weights else self._are_weights_new()
        )
        self._close_hooks()
        self.windows.update(
            (name, dataclasses.replace(window, is_held=name in self._held))
            for name, window in self._inputs.windows(step).items()
        )
        if isinstance(self.gap, ModeGap):
            self.earlier_gaps = (*self.earlier_gaps, self.gap)[-_MAX_EARLIER_GAPS:]
        self.gap_in_training = None
        if self.has_exchanged_weights:
            self.gap = "the weights were exchanged before the evaluated network could run again"
            return
        self.gap = self._gap_probe.measure()
        if isinstance(self.gap, ModeGap) and self.gap.relative_change > _LARGE_GAP:
            in_training = self._training_gap_probe.measure(self._held)
            self.gap_in_training = in_training if isinstance(in_training, ModeGap) else None

    def drop(self) -> None:
        """Let go of the batches of an evaluation, and of those of training before it."""
        self._close_hooks()
        self._gap_probe.start_anew()
        self._training_gap_probe.start_anew()

    def has_read_a_batch(self) -> bool:
        """Return whether the newest evaluation has as many values as a batch of training."""
        return any(
            window.count >= max(self._shapes.records[name].values_per_channel(), default=0)
            for name, window in self._inputs.windows(step=0).items()
        )

    def close(self) -> None:
        """Remove the hooks on training, and drop its batches."""
        self._training_gap_probe.close()

    def _close_hooks(self) -> None:
        for hooks in self.hooks:
            hooks.close()

    def _find_held_in_eval_mode(self) -> set[str]:
        """Return the layers that the newest training step called in eval mode only."""
        records, step = self._shapes.records, self._shapes.step - 1
        names = (layer.name for layer in self._layers)
        return {name for name in names if records[name].is_held_in_eval_mode(step)}

    def _are_weights_new(self) -> bool:
        """Return whether something other than a step of training wrote the current weights."""
        return self._is_bystander is not None and (
            self._weights.have_changed()
            # The weights of a copy are written while the model trains.
            or (self._is_bystander and self._weights.have_changed_since_start(self._model))
        )

    def _was_never_called(self) -> bool:
        """Return whether no training batch reached the model, as if it were a copy of another."""
        return not self._trained_by.trains(self._model) and all(
            self._shapes.records[layer.name].position is None for layer in self._layers
        )
