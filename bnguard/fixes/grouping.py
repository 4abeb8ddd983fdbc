"""How many groups a group norm gets: as many as asked for, as long as each has enough values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

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
    model: nn.Module, layers: Iterable[BatchNormLayer], forward: Forward | None, sample: Batch
) -> tuple[Mapping[str, int], object]:
    """Return the values a channel and sample that arrive at each layer, the fewest of its calls.

    Layers that the sample does not reach are left out. The second value is what the model, in
    eval mode, returned.
    """
    layers = tuple(layers)
    positions: dict[str, int] = {}

    def measure(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        here = args[0].shape[2:].numel()
        positions[name] = min(here, positions.get(name, here))

    with ExitStack() as stack:
        for layer in layers:
            handle = layer.module.register_forward_pre_hook(partial(measure, layer.name))
            stack.callback(handle.remove)
        return positions, evaluated(model, forward, sample)


def evaluated(model: nn.Module, forward: Forward | None, batch: Batch) -> object:
    """Return what a model gives for a batch in eval mode; the model stays as it is."""
    with preserved_modes(model), preserved_random_state(model), torch.no_grad():
        model.eval()
        return call(model, forward, batch)
