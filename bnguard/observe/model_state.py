"""What a model says of its BN layers without being run: settings, parameters, and neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bnguard.layers.bn_layer import BatchNormLayer, find_layers
from bnguard.layers.distances import FloatArray
from bnguard.layers.moments import wide
from bnguard.observe.history import LayerHistory, RunningStatistics

# Classes whose bias shifts a whole channel, so that BN takes it out again.
_BIASED = (nn.Linear, nn.modules.conv._ConvNd)

# Classes whose outputs have a least and a largest value; ReLU6 is a Hardtanh.
_BOUNDED = (nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softsign)


def describe_layers(model: nn.Module) -> dict[str, LayerHistory]:
    """Return a history a BN layer, by name, that holds what the modules alone tell.

    >>> layers = describe_layers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    >>> layers["1"].fed_by, layers["1"].is_bias_cancelled
    ('Conv2d', True)
    """
    feeders, bounds = _feeders(model), _bounds(model)
    layers = find_layers(model)
    tensors = [
        tensor
        for layer in layers
        for tensor in (
            layer.weight,
            layer.bias,
            layer.running_mean,
            layer.running_var,
            layer.counter,
        )
    ]
    arrays = iter(on_host(tensors))
    return {
        layer.name: _described(
            layer,
            feeders.get(id(layer.module)),
            bounds.get(id(layer.module)),
            *itertools.islice(arrays, 5),
        )
        for layer in layers
    }


def _described(
    layer: BatchNormLayer,
    feeder: nn.Module | None,
    bounded_by: str | None,
    gamma: FloatArray | None,
    beta: FloatArray | None,
    mean: FloatArray | None,
    var: FloatArray | None,
    counter: FloatArray | None,
) -> LayerHistory:
    affine, running_mean = layer.affine, layer.running_mean
    return LayerHistory(
        name=layer.name,
        kind=type(layer.module).__name__,
        channels=layer.channels,
        eps=layer.eps,
        momentum=layer.momentum,
        training=layer.is_training,
        is_affine_frozen=not any(part.requires_grad for part in affine) if affine else None,
        is_updating=(
            not layer.adapter.is_frozen and bool(getattr(layer.module, "track_running_stats", True))
        ),
        fed_by=None if feeder is None else type(feeder).__name__,
        bounded_by=bounded_by,
        is_bias_cancelled=isinstance(feeder, _BIASED) and feeder.bias is not None,
        idle_children=_idle_children(layer.module),
        gamma=gamma,
        beta=beta,
        statistics_dtype=(
            None if running_mean is None else str(running_mean.dtype).removeprefix("torch.")
        ),
        running=_running(mean, var, counter),
    )


def running_statistics(
    mean: Tensor | None, var: Tensor | None, counter: Tensor | None
) -> RunningStatistics | None:
    """Return the running statistics on the host; None where there are none."""
    return _running(*on_host([mean, var, counter]))


def _running(
    mean: FloatArray | None, var: FloatArray | None, counter: FloatArray | None
) -> RunningStatistics | None:
    if mean is None or var is None:
        return None
    return RunningStatistics(
        mean=mean, var=var, updates=None if counter is None else int(counter.item())
    )


def on_host(tensors: Sequence[Tensor | None]) -> list[FloatArray | None]:
    """Return copies of tensors on the host, in float64 and flat, in one transfer a device.

    None for None, and for a tensor that holds no values yet.

    >>> on_host([torch.tensor([1.0, 2.0]), None])
    [array([1., 2.]), None]
    """
    arrays: list[FloatArray | None] = [None] * len(tensors)
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        if tensor is not None and not tensor.is_meta:
            by_device.setdefault(tensor.device, []).append((place, tensor.detach().view(-1)))
    for parts in by_device.values():
        row = torch.cat([wide(tensor) for _, tensor in parts]).cpu().double().numpy()
        edges = np.cumsum([tensor.numel() for _, tensor in parts])[:-1]
        for (place, _), values in zip(parts, np.split(row, edges), strict=True):
            arrays[place] = values
    return arrays


def _idle_children(module: nn.Module) -> tuple[str, ...]:
    """Return the classes of the children that the module, one of PyTorch's own, never calls."""
    if not type(module).__module__.startswith("torch.nn."):
        return ()
    children = (child for child in module.children() if not isinstance(child, nn.Identity))
    return tuple(type(child).__name__ for child in children)


def _feeders(model: nn.Module) -> dict[int, nn.Module]:
    """Return the module that feeds another, by its identity, where a ``Sequential`` says so."""
    return {
        id(module): feeder
        for parent in model.modules()
        if isinstance(parent, nn.Sequential)
        for feeder, module in itertools.pairwise(parent)
    }


def _bounds(model: nn.Module) -> dict[int, str]:
    """Return the class of the bounded activation that a module feeds, by its identity."""
    return {
        id(module): type(activation).__name__
        for parent in model.modules()
        if isinstance(parent, nn.Sequential)
        for module, activation in itertools.pairwise(parent)
        if isinstance(activation, _BOUNDED)
    }
