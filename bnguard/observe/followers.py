"""Layers that follow others: something writes their weights, but their statistics stay.

A teacher or target network has such layers if only its parameters are copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.observe.eval_statistics import EvalProbe
from bnguard.observe.history import EvalWindow, LayerHistory
from bnguard.observe.hooks import Hooks
from bnguard.observe.layer_calls import ShapeRecord
from bnguard.observe.layer_description import running_statistics
from bnguard.observe.trained_parameters import OptimizerProbe, WeightProbe


class FollowerProbe:
    """Finds the followers of a model, and reads their inputs while other parts train.

    Args:
        model: The model.
        records: The calls of its layers so far, by name.
        trained_by: Its optimizers.
        weights: What writes to its weights.
        at_start: What its layers were when watching began, by name.
        eval_batches: First batches of a window that are read; of the rest ever fewer are.

    Attributes:
        layers: The followers.
    """

    def __init__(
        self,
        model: nn.Module,
        records: Mapping[str, ShapeRecord],
        trained_by: OptimizerProbe,
        weights: WeightProbe,
        at_start: Mapping[str, LayerHistory],
        eval_batches: int,
    ) -> None:
        self.layers: tuple[BatchNormLayer, ...] = ()
        self._model = model
        self._records = records
        self._trained_by = trained_by
        self._weights = weights
        self._at_start = at_start
        self._eval_batches = eval_batches
        self._windows: dict[str, EvalWindow] = {}
        self._inputs = EvalProbe(model, (), eval_batches)

    @property
    def hooks(self) -> Hooks:
        """The hooks on the followers."""
        return self._inputs.hooks

    def follow_model(self, layers: Sequence[BatchNormLayer], step: int) -> None:
        """Look for followers among these layers, those of the model after a step."""
        found = tuple(self._find(layers))
        if found != self.layers:
            self.layers = found
            self.start_window(step)

    def start_window(self, step: int) -> None:
        """Begin a new window of inputs after a step."""
        self.windows(step)
        self._inputs.hooks.close()
        self._inputs = EvalProbe(self._model, self.layers, self._eval_batches)

    def windows(self, step: int) -> dict[str, EvalWindow]:
        """Return the newest inputs of each layer that is or was a follower, by its name."""
        self._windows.update(self._inputs.windows(step))
        return self._windows

    def _find(self, layers: Sequence[BatchNormLayer]) -> Iterator[BatchNormLayer]:
        parts: Iterable[nn.Module] = self._trained_by.untrained_parts(self._model)
        has_gradients = any(
            self._records[layer.name].calls.in_eval_mode_with_grad for layer in layers
        )
        if not self._trained_by.owned_parameters() and not has_gradients:
            parts = [self._model]
        for part in parts:
            modules = set(part.modules())
            uncalled = [
                layer
                for layer in layers
                if layer.module in modules and not self._records[layer.name].values_per_channel()
            ]
            if uncalled and self._weights.have_changed_since_start(part):
                yield from filter(self._is_as_at_start, uncalled)

    def _is_as_at_start(self, layer: BatchNormLayer) -> bool:
        """Return whether a layer has the statistics of the start."""
        start = self._at_start.get(layer.name)
        running = running_statistics(layer.running_mean, layer.running_var, layer.counter)
        if start is None or start.running is None or running is None:
            return False
        return bool(
            np.array_equal(start.running.mean, running.mean)
            and np.array_equal(start.running.var, running.var)
        )
