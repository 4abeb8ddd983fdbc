"""How many groups a group norm gets: as many as asked for, as long as each has enough values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from bnguard.fixes.calibration.arrivals import arrivals
from bnguard.fixes.calibration.batches import Batch, Forward, call
from bnguard.layers import (
    BatchNormLayer,
    preserved_modes,
    preserved_random_state,
)


def choose_groups(channels: int, wanted: int, positions: int | None, min_values: int) -> int:
    """Return the largest number of groups, at most ``wanted``, whose groups are large enough.

    Args:
        channels: Channels of the layer; the groups divide them.
        wanted: Groups asked for.
        positions: Values a channel and sample; None where it is not known, and two channels a
            group then make sure that no group has one value alone.
        min_values: Values that a group must have; where even one group has fewer, it is one.

    >>> choose_groups(64, 32, 49, 16), choose_groups(48, 32, 49, 16), choose_groups(64, 32, 1, 16)
    (32, 24, 4)
    >>> choose_groups(16, 32, None, 16)
    8
    """
    if positions is None:
        positions, min_values = 1, 2
    for groups in range(min(wanted, channels), 1, -1):
        if channels % groups == 0 and channels // groups * positions >= min_values:
            return groups
    return 1


def measure_positions(
    model: nn.Module, layers: Sequence[BatchNormLayer], forward: Forward | None, sample: Batch
) -> tuple[Mapping[str, int], object]:
    """Return the values a channel and sample that arrive at each layer, the fewest of its calls.

    Layers that the sample does not reach are left out. The second value is what the model, in
    eval mode, returned.
    """
    positions: dict[str, int] = {}

    def measure(index: int, values: Tensor) -> None:
        name, here = layers[index].name, values.shape[2:].numel()
        positions[name] = min(here, positions.get(name, here))

    with arrivals(layers, measure):
        return positions, evaluated(model, forward, sample)


def evaluated(model: nn.Module, forward: Forward | None, batch: Batch) -> object:
    """Return what a model gives for a batch in eval mode; the model stays as it is."""
    with preserved_modes(model), preserved_random_state(model), torch.no_grad():
        model.eval()
        return call(model, forward, batch)
