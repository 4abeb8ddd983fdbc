"""Collect the outputs of a model, and the inputs of its layers, for all samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments, merge_moments
from bnguard.observe.mode_gap import (
    flipped_share,
    float_tensors,
    join_rows,
    places_of_rows,
    relative_change,
)
from bnguard.recalibration.batches import Batch, Forward, call
from bnguard.recalibration.layer_inputs import input_moments, is_finite, on_host, read_inputs
from bnguard.whatif.samples import copy_inputs

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
        mine, wanted = self._shared_with(expected)
        if not wanted or [t.shape for t in mine] != [t.shape for t in wanted]:
            raise CalibrationError(
                "the model's outputs change their shape with the statistics, so they cannot be "
                "compared: wrap the model in one that returns scores or features, or pass a forward"
            )
        return relative_change(mine, wanted)

    def flipped_share(self, expected: Outputs) -> float | None:
        """Return the share of predictions that flip; None if no output looks like class scores."""
        return flipped_share(*self._shared_with(expected))

    def changed_share(self, expected: Outputs) -> float:
        """Return the share of predictions that differ, ties included; 0 without class scores."""
        return flipped_share(*self._shared_with(expected), max_tie=0.0) or 0.0

    def _shared_with(self, expected: Outputs) -> tuple[list[Tensor], list[Tensor]]:
        # A tensor that has a row per sample by chance, at one batch size, may not at others.
        places = sorted(self.tensors.keys() & expected.tensors.keys())
        return (
            [self.tensors[place] for place in places],
            [expected.tensors[place] for place in places],
        )

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


def collect_outputs(model: nn.Module, forward: Forward | None, batches: Iterable[Batch]) -> Outputs:
    """Run a model on batches, and return its outputs.

    Raises:
        CalibrationError: The forward failed, or its outputs cannot be compared.
    """
    returned, sizes = [], []
    for batch in batches:
        returned.append(_returned(model, forward, batch))
        sizes.append(batch.size)
    if not returned[0] or len({len(tensors) for tensors in returned}) > 1:
        raise CalibrationError(
            f"{type(model).__name__} returns no floating-point tensors, or not always as many: "
            "wrap the model in one that returns scores or features, or pass a forward"
        )
    columns = tuple(zip(*returned, strict=True))
    places = places_of_rows(returned, sizes)
    return Outputs(
        tensors={
            place: join_rows([_thinned(tensor) for tensor in columns[place]])
            for place in places or range(len(columns))
        },
        samples=sum(sizes) if places else None,
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


def collect_inputs(
    layers: Sequence[BatchNormLayer],
    model: nn.Module,
    forward: Forward | None,
    batches: Iterable[Batch],
) -> tuple[dict[str, LayerInput], Outputs]:
    """Return the inputs of each layer, in the order of first calls, and the outputs."""
    parts: dict[str, list[Moments]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    size = 1

    def add_moments(index: int, values: Tensor) -> None:
        name = layers[index].name
        moments = on_host(input_moments(values))
        parts.setdefault(name, []).append(moments)
        sizes.setdefault(name, (max(1, len(values) // size), max(1, moments.count // size)))

    def noting_sizes() -> Iterable[Batch]:
        nonlocal size
        for batch in batches:
            size = batch.size
            yield batch

    with read_inputs(layers, add_moments):
        outputs = collect_outputs(model, forward, noting_sizes())
    return {name: LayerInput(_merged(seen), *sizes[name]) for name, seen in parts.items()}, outputs


def _merged(parts: Iterable[Moments]) -> Moments | None:
    finite = [part for part in parts if is_finite(part)]
    return merge_moments(finite) if finite else None


def _returned(model: nn.Module, forward: Forward | None, batch: Batch) -> list[Tensor]:
    # A copy, because a forward may write to its input.
    given = Batch(batch.index, copy_inputs(batch.args), copy_inputs(batch.kwargs), batch.size)
    return [tensor.detach().float().cpu() for tensor in float_tensors(call(model, forward, given))]


def _thinned(tensor: Tensor) -> Tensor:
    """Return evenly spaced positions of an output that has many."""
    if tensor.dim() < 3:
        return tensor
    positions = tensor.flatten(2)
    step = -(-positions.shape[1] * positions.shape[2] // _MAX_NUMBERS_A_SAMPLE)
    return positions[:, :, :: max(1, step)]
