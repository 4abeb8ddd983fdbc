"""Collect the outputs of a model, and the inputs of its layers, for all samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer, device_of
from bnguard.layers.moments import Moments, merge_moments
from bnguard.observe.mode_gap import (
    flipped_share,
    float_tensors,
    join_rows,
    places_of_rows,
    relative_change,
)
from bnguard.recalibration.batches import Batch, Forward, call
from bnguard.recalibration.statistics import input_moments, read_inputs
from bnguard.whatif.samples import copy_batch

# Numbers that are kept of an output with positions, as an image; class scores are kept whole.
_MAX_NUMBERS_A_SAMPLE = 4096


@dataclass(frozen=True, eq=False)
class Outputs:
    """The outputs of a model for all samples.

    Attributes:
        tensors: Each returned tensor that has a row per sample, by its place in the output, over
            all batches; all returned tensors if none has.
        samples: Number of samples if each is a row of the tensors, else None.
    """

    tensors: Mapping[int, Tensor]
    samples: int | None

    @property
    def are_finite(self) -> bool:
        """Whether all values are finite."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors.values())

    def change_from(self, expected: Outputs) -> float:
        """Return the root mean square change, in standard deviations of the expected outputs.

        Raises:
            CalibrationError: The shapes differ.
        """
        mine, wanted = self._choose_shared(expected)
        if not wanted or [t.shape for t in mine] != [t.shape for t in wanted]:
            raise CalibrationError(
                "the model's outputs change their shape with the statistics, so they cannot be "
                "compared: wrap the model in one that returns scores or features, or pass a forward"
            )
        return relative_change(mine, wanted)

    def flipped_share(self, expected: Outputs) -> float | None:
        """Return the share of predictions that flip; None if no output looks like class scores."""
        return flipped_share(*self._choose_shared(expected))

    def changed_share(self, expected: Outputs) -> float:
        """Return the share of predictions that differ, ties included; 0 without class scores."""
        return flipped_share(*self._choose_shared(expected), max_tie=0.0) or 0.0

    def _choose_shared(self, expected: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        # A tensor that has a row per sample by chance, at one batch size, may not at others.
        places = sorted(self.tensors.keys() & expected.tensors.keys())
        return (
            [self.tensors[place] for place in places],
            [expected.tensors[place] for place in places],
        )

    def first(self, samples: int) -> Outputs | None:
        """Return the outputs of the first samples; None without a row per sample."""
        if any(len(tensor) != self.samples for tensor in self.tensors.values()):
            return None
        return Outputs({place: rows[:samples] for place, rows in self.tensors.items()}, samples)

    def in_order(self, order: Sequence[int]) -> Outputs | None:
        """Return the outputs of shuffled samples in their original order; None without rows.

        Args:
            order: The sample in each place.
        """
        if self.samples is None:
            return None
        back = torch.argsort(torch.tensor(order))
        return Outputs(
            tensors={place: tensor[back] for place, tensor in self.tensors.items()},
            samples=self.samples,
        )


@dataclass(frozen=True, eq=False)
class LayerInput:
    """The inputs of a layer in eval mode.

    Attributes:
        moments: Moments of all batches that were finite; None if none was.
        rows: Rows per sample.
        values_per_sample: Values per channel and sample.
    """

    moments: Moments | None
    rows: int
    values_per_sample: int


class Readings:
    """What a model returned and what its layers met, batch by batch."""

    def __init__(self, model: nn.Module, layers: Sequence[BatchNormLayer]) -> None:
        self.sizes: list[int] = []
        self._model = model
        self._layers = layers
        self._returned: list[list[Tensor]] = []
        self._pending: list[tuple[str, Moments, int]] = []
        self._met: dict[str, list[Moments]] = {}
        self._shapes: dict[str, tuple[int, int]] = {}

    def start_batch(self) -> None:
        """Forget the inputs of a forward that has not ended."""
        self._pending.clear()

    def add_input(self, index: int, values: Tensor) -> None:
        """Add the inputs of a layer in the present batch."""
        moments = input_moments(values).on_host()
        self._pending.append((self._layers[index].name, moments, len(values)))

    def end_batch(self, output: object, size: int) -> None:
        """Add what the model returned for the present batch."""
        self.sizes.append(size)
        # A copy of its own, because the caller may write to the output.
        self._returned.append(
            [
                _thin(tensor.detach()).to("cpu", torch.float32, copy=True)
                for tensor in float_tensors(output)
            ]
        )
        for name, moments, rows in self._pending:
            self._met.setdefault(name, []).append(moments)
            self._shapes.setdefault(name, (max(1, rows // size), max(1, moments.count // size)))
        self._pending.clear()

    @property
    def inputs(self) -> dict[str, LayerInput]:
        """The inputs of each layer, in the order of first calls."""
        return {
            name: LayerInput(_merge(met), *self._shapes[name]) for name, met in self._met.items()
        }

    @property
    def outputs(self) -> Outputs:
        """The outputs; raises CalibrationError if they cannot be compared."""
        returned = self._returned
        if not returned[0] or len({len(tensors) for tensors in returned}) > 1:
            raise CalibrationError(
                f"{type(self._model).__name__} returns no floating-point tensors, or not always as "
                "many: wrap the model in one that returns scores or features, or pass a forward"
            )
        columns = tuple(zip(*returned, strict=True))
        places = places_of_rows(returned, self.sizes)
        return Outputs(
            tensors={place: join_rows(columns[place]) for place in places or range(len(columns))},
            samples=sum(self.sizes) if places else None,
        )


def collect_inputs(
    layers: Sequence[BatchNormLayer],
    model: nn.Module,
    forward: Forward | None,
    batches: Iterable[Batch],
) -> tuple[dict[str, LayerInput], Outputs]:
    """Run a model on batches; return the inputs of each layer, and the outputs.

    Raises:
        CalibrationError: The forward failed, or its outputs cannot be compared.
    """
    readings = Readings(model, layers)
    with read_inputs(layers, readings.add_input):
        for batch in batches:
            readings.end_batch(call(model, forward, copy_batch(batch)), batch.size)
    return readings.inputs, readings.outputs


def collect_outputs(model: nn.Module, forward: Forward | None, batches: Iterable[Batch]) -> Outputs:
    """Run a model on batches, and return its outputs; raises as :func:`collect_inputs`."""
    return collect_inputs((), model, forward, batches)[1]


@contextmanager
def overhear(
    layers: Sequence[BatchNormLayer], model: nn.Module, batches: Sequence[Batch]
) -> Iterator[Readings]:
    """Collect what :func:`collect_inputs` does from forwards that other code makes of the batches.

    A forward counts if it has the values of the next batch, and the modes and autocast settings
    from outside. The other code may leave batches out, or run others.
    """
    readings, settings = Readings(model, layers), _settings(model)
    batch: Batch | None = None

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        nonlocal batch
        readings.start_batch()
        awaited = next(iter(batches[len(readings.sizes) :]), None)
        is_heard = (
            # A copy of the model has these hooks too.
            module is model
            and awaited is not None
            and _settings(model) == settings
            and _are_equal((awaited.args, dict(awaited.kwargs)), (args, kwargs))
        )
        batch = awaited if is_heard else None

    def on_input(index: int, values: Tensor) -> None:
        if batch is not None:
            readings.add_input(index, values)

    def after(module: nn.Module, args: object, output: object) -> None:
        nonlocal batch
        if batch is not None:
            readings.end_batch(output, batch.size)
        batch = None

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(model.register_forward_hook(after).remove)
        stack.enter_context(read_inputs(layers, on_input))
        yield readings


def _settings(model: nn.Module) -> tuple[object, ...]:
    device = device_of(model).type
    autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
    return (*autocast, *(module.training for module in model.modules()))


def _are_equal(one: object, other: object) -> bool:
    """Return whether two calls have the same arguments: equal tensors and plain values."""
    (mine, structure), (others, other_structure) = tree_flatten(one), tree_flatten(other)
    return structure == other_structure and all(map(_is_equal, mine, others))


def _is_equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        is_alike = (one.dtype, one.device, one.layout) == (other.dtype, other.device, torch.strided)
        return is_alike and torch.equal(one, other)
    return one is other or (
        type(one) is type(other) and isinstance(one, (bool, int, float, str)) and one == other
    )


def _merge(parts: Iterable[Moments]) -> Moments | None:
    finite = [part for part in parts if part.is_finite]
    return merge_moments(finite) if finite else None


def _thin(tensor: Tensor) -> Tensor:
    """Return evenly spaced positions of an output that has many."""
    if tensor.dim() < 3:
        return tensor
    positions = tensor.flatten(2)
    step = -(-positions.shape[1] * positions.shape[2] // _MAX_NUMBERS_A_SAMPLE)
    return positions[:, :, :: max(1, step)]
