"""Run a model on samples, with other statistics: given ones, or those of each batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import values_per_channel
from bnguard.layers.preserve import preserve_modes, preserve_statistics
from bnguard.observe.history import RunningStatistics
from bnguard.recalibration.api import measure_score
from bnguard.recalibration.batches import Batch, Forward
from bnguard.recalibration.options import Score
from bnguard.recalibration.statistics import replace_statistics
from bnguard.whatif.model_outputs import (
    LayerInput,
    Outputs,
    collect_inputs,
    collect_outputs,
    overhear,
)
from bnguard.whatif.samples import Samples

Statistics = Mapping[str, RunningStatistics]


@contextmanager
def use_statistics(layers: Sequence[BatchNormLayer], statistics: Statistics) -> Iterator[None]:
    """Let layers normalise with these statistics; layers not among them keep theirs."""
    with preserve_statistics(layers):
        for layer in layers:
            if layer.name in statistics:
                given = statistics[layer.name]
                replace_statistics(layer, torch.from_numpy(given.mean), torch.from_numpy(given.var))
        yield


@dataclass(eq=False)
class BatchStatistics:
    """Lets layers normalise a fixed number of samples at a time by their own statistics.

    A larger batch is normalised in parts, so that a score can be measured at any batch size up to
    that of its own batches. Each layer counts samples by the rows that one sample has there.

    Attributes:
        layers: The layers, in eval mode.
        rows: Rows per sample in a layer's input, by the layer's name.
        size: Samples per part; None for batches as they come.
        largest_part: Samples in the largest part so far.
    """

    layers: Sequence[BatchNormLayer]
    rows: Mapping[str, int]
    size: int | None
    largest_part: int = 0

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Normalise this way for a while."""
        with preserve_statistics(self.layers), ExitStack() as replaced:
            for layer in self.layers:
                replaced.enter_context(self._replace_forward(layer))
            yield

    @contextmanager
    def _replace_forward(self, layer: BatchNormLayer) -> Iterator[None]:
        attributes = vars(layer.module)
        own = attributes.get("forward")
        attributes["forward"] = self._in_parts(layer, layer.module.forward)
        try:
            yield
        finally:
            if own is None:
                del attributes["forward"]
            else:
                attributes["forward"] = own

    def _in_parts(
        self, layer: BatchNormLayer, forward: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        rows = self.rows.get(layer.name, 1)

        def normalise(values: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
            self.largest_part = max(self.largest_part, len(values) // rows)
            # A single value has no variance to divide by: the last batch may be one sample.
            with preserve_modes(layer.module):
                layer.module.training = values_per_channel(values.shape) > 1
                return call(values)

        def in_parts(*args: Any, **kwargs: Any) -> Tensor:
            if args:
                values, call = args[0], lambda part: forward(part, *args[1:], **kwargs)
            else:
                key, values = next(iter(kwargs.items()))
                call = lambda part: forward(**{**kwargs, key: part})  # noqa: E731
            if self.size is None or len(values) <= self.size * rows:
                return normalise(values, call)
            sizes = [self.size * rows] * (len(values) // (self.size * rows))
            sizes[-1] += len(values) - sum(sizes)
            return torch.cat([normalise(part, call) for part in values.split(sizes)])

        return in_parts


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """The model with one way to normalise.

    Attributes:
        outputs: Outputs of the model.
        score: Result of the score; None without one, or if its batches are too small.
        inputs: Inputs of each layer that was reached, in the order of first calls; empty if
            batches have statistics of their own.
    """

    outputs: Outputs
    score: float | None
    inputs: Mapping[str, LayerInput]


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A model on some samples.

    Attributes:
        model: The user's model, which is scored.
        inner: The same without wrappers, in eval mode.
        layers: The layers whose statistics change.
        untracked: Layers that always use the statistics of each batch.
        forward: Calls the model.
        score: Returns how good the model is, the higher the better.
        samples: The samples.
    """

    model: nn.Module
    inner: nn.Module
    layers: Sequence[BatchNormLayer]
    untracked: Sequence[BatchNormLayer]
    forward: Forward | None
    score: Score | None
    samples: Samples

    def with_statistics(self, statistics: Statistics) -> Measured:
        """Measure the model with given statistics."""
        batches = self.samples.batches
        with use_statistics(self.layers, statistics):
            score, seen = self._score(self.layers, batches)
            if seen is None:
                seen = collect_inputs(self.layers, self.inner, self.forward, batches)
        inputs, outputs = seen
        return Measured(outputs=outputs, score=score, inputs=inputs)

    def with_batches(self, size: int | None) -> Measured:
        """Measure the model with each ``size`` samples normalised by their own statistics.

        Batches are used as they come if it is None.
        """
        batches = self.samples.batches if size is None else self.samples.of_size(size)
        parts = self.batch_statistics(size)
        with parts.in_use():
            score, seen = self._score((), batches)
        is_full = size is None or parts.largest_part >= size
        outputs = self.outputs_in_batches(batches, size) if seen is None else seen[1]
        return Measured(outputs=outputs, score=score if is_full else None, inputs={})

    def outputs_with(self, statistics: Statistics, batches: Iterable[Batch]) -> Outputs:
        """Return the outputs for some batches with given statistics."""
        with use_statistics(self.layers, statistics):
            return collect_outputs(self.inner, self.forward, batches)

    def outputs_in_batches(self, batches: Iterable[Batch], size: int | None = None) -> Outputs:
        """Return the outputs with each ``size`` samples normalised by their own statistics."""
        with self.batch_statistics(size).in_use():
            return collect_outputs(self.inner, self.forward, batches)

    def outputs_in_shuffled_batches(self) -> Outputs | None:
        """Return the same with other neighbours in each batch; None if that is impossible."""
        shuffled = self.samples.shuffled()
        if shuffled is None:
            return None
        order, batches = shuffled
        return self.outputs_in_batches(batches).in_order(order)

    def why_not_in_batches(self, size: int) -> str | None:
        """Return why batches cannot have this size; None if they can."""
        if size > len(self.samples):
            number = len(self.samples)
            return "there is 1 sample" if number == 1 else f"there are {number} samples"
        if self.samples.must_be_joined(size):
            # The one batch would take the remainder, and be of another size.
            if size != len(self.samples) < 2 * size:
                return f"{len(self.samples)} samples make only one"
            if self.samples.whole is None:
                return "the samples do not fit together, so that batches cannot be joined"
            if self._one_batch[1].samples is None:
                return "the outputs have no row a sample, so that batches cannot be joined"
        for name, values in self.values_per_sample.items():
            if size * values < 2:
                return f"{name or 'the model'} has one value per channel"
        return None

    @property
    def values_per_sample(self) -> Mapping[str, int]:
        """Values per channel and sample at each layer that is reached."""
        return {name: seen.values_per_sample for name, seen in self._layer_inputs.items()}

    @property
    def order_of_calls(self) -> Sequence[str]:
        """Names of the layers that are reached, in the order of their first calls."""
        return list(self._layer_inputs)

    def without_nonfinite_batches(self, statistics: Statistics) -> Bench:
        """Return the same without the samples whose outputs are NaN or Inf with these statistics.

        Raises:
            CalibrationError: That leaves none.
        """
        batches = tuple(
            batch
            for batch in self.samples.batches
            if self.outputs_with(statistics, [batch]).are_finite
        )
        if not batches:
            raise CalibrationError(
                "the outputs are NaN or Inf for every batch, with any statistics"
            )
        return replace(self, samples=Samples(batches))

    @property
    def _layer_inputs(self) -> Mapping[str, LayerInput]:
        return self._one_batch[0]

    @cached_property
    def _one_batch(self) -> tuple[Mapping[str, LayerInput], Outputs]:
        """Inputs of the layers and outputs for one batch, which show the rows per sample."""
        layers = (*self.layers, *self.untracked)
        return collect_inputs(layers, self.inner, self.forward, self.samples.batches[:1])

    def batch_statistics(self, size: int | None) -> BatchStatistics:
        """Return how to let each ``size`` samples have their own statistics; None for batches."""
        layers = [layer for layer in (*self.layers, *self.untracked) if layer.has_modes]
        rows = {name: seen.rows for name, seen in self._layer_inputs.items()}
        return BatchStatistics(layers, rows, size)

    def _score(
        self, layers: Sequence[BatchNormLayer], batches: Sequence[Batch]
    ) -> tuple[float | None, tuple[Mapping[str, LayerInput], Outputs] | None]:
        """Return the score, and what :func:`collect_inputs` would, if it runs the same batches."""
        if self.score is None:
            return None, None
        # A forward of the user's own does not show what the model is called with.
        batches = batches if self.forward is None else ()
        with overhear(layers, self.inner, batches) as heard:
            score = measure_score(self.model, self.score)
        is_complete = 0 < len(heard.sizes) == len(batches)
        return score, (heard.inputs, heard.outputs) if is_complete else None
