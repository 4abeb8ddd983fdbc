"""How a model differs from another of the same shape: in its weights, and in its statistics."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bnguard.errors import ConfigurationError
from bnguard.layers.names import without_wrappers
from bnguard.observe.history import RunningStatistics
from bnguard.observe.model_state import running_statistics

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def tensors_of(subject: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights and buffers by name, without what wrappers put before the names."""
    state = subject.state_dict() if isinstance(subject, nn.Module) else subject
    return {
        without_wrappers(name): value.detach()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def weight_change(subject: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Return |weights - reference| / |reference|, Euclidean norms over all that both have.

    Raises:
        ConfigurationError: They have no weight of one name and shape.
    """
    change = size = 0.0
    is_any = False
    for name, value in subject.items():
        other = reference.get(name)
        if other is None or other.shape != value.shape or name.endswith(_STATISTICS):
            continue
        if not (value.is_floating_point() and other.is_floating_point()):
            continue
        is_any = True
        other = other.to("cpu", torch.float64)
        change += (value.to("cpu", torch.float64) - other).square().sum().item()
        size += other.square().sum().item()
    if not is_any:
        raise ConfigurationError(
            "the reference has no weight in common with what is inspected: give the model that it "
            "was averaged, pruned or copied from"
        )
    return math.sqrt(change / size) if size > 0.0 else math.sqrt(change)


def statistics_of(state: Mapping[str, Tensor], layer: str) -> RunningStatistics | None:
    """Return the running statistics of the layer with this name; None where it has none."""
    prefix = f"{layer}." if layer else ""
    mean, var, counter = (state.get(prefix + name) for name in _STATISTICS)
    return running_statistics(mean, var, counter)
