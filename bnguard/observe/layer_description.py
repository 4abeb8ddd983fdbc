"""The BN layers of a model that does not run: settings, parameters, statistics and neighbours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnguard.errors import ConfigurationError
from bnguard.layers.bn_layer import BatchNormLayer, find_layers
from bnguard.layers.distances import FloatArray
from bnguard.layers.moments import wide
from bnguard.layers.names import without_wrappers
from bnguard.observe.history import LayerHistory, RunningStatistics

# Classes whose bias shifts a whole channel, so that BN removes it.
_BIASED = (nn.Linear, nn.modules.conv._ConvNd)
# Activations with bounded outputs; ReLU6 is a Hardtanh.
_BOUNDED = (nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softsign)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def describe_layers(model: nn.Module) -> dict[str, LayerHistory]:
    """Return a history per BN layer, by name, with what is known without running the model.

    >>> layers = describe_layers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    >>> layers["1"].fed_by, layers["1"].is_bias_cancelled
    ('Conv2d', True)
    """
    before, after, tails = *_neighbours(model), _missing_tails(model)
    layers = find_layers(model)
    tensors = ((x.weight, x.bias, x.running_mean, x.running_var, x.counter) for x in layers)
    arrays = iter(on_host(list(itertools.chain.from_iterable(tensors))))
    return {
        layer.name: _describe(
            layer,
            before.get(layer.module),
            after.get(layer.module),
            tails.get(layer.module, ()),
            *itertools.islice(arrays, 5),
        )
        for layer in layers
    }


def running_statistics(
    mean: Tensor | None, var: Tensor | None, counter: Tensor | None
) -> RunningStatistics | None:
    """Return the running statistics on the host; None without them."""
    return _running(*on_host([mean, var, counter]))


def on_host(tensors: Sequence[Tensor | None]) -> list[FloatArray | None]:
    """Return flat float64 copies of tensors on the host, in one transfer per device.

    None for None, and for a tensor without values.

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


def tensors_of(subject: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights and buffers by name, without the prefixes of wrappers."""
    state = subject.state_dict() if isinstance(subject, nn.Module) else subject
    return {
        without_wrappers(name): value.detach()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def weight_change(subject: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Return |weights - reference| / |reference|, Euclidean norms over the weights of both.

    Raises:
        ConfigurationError: No weight has the same name and shape in both.
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
    """Return the running statistics of the layer with this name; None without them."""
    prefix = f"{layer}." if layer else ""
    mean, var, counter = (state.get(prefix + name) for name in _STATISTICS)
    return running_statistics(mean, var, counter)


def _describe(
    layer: BatchNormLayer,
    feeder: nn.Module | None,
    follower: nn.Module | None,
    missing_tail: tuple[str, ...],
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
        # A layer built without statistics has no counter either.
        is_dropped=mean is None and counter is not None,
        unsaved=_find_unsaved(layer),
        fed_by=None if feeder is None else type(feeder).__name__,
        bounded_by=type(follower).__name__ if isinstance(follower, _BOUNDED) else None,
        is_bias_cancelled=isinstance(feeder, _BIASED) and feeder.bias is not None,
        idle_children=_idle_children(layer.module),
        missing_tail=missing_tail,
        gamma=gamma,
        beta=beta,
        statistics_dtype=(
            None if running_mean is None else str(running_mean.dtype).removeprefix("torch.")
        ),
        running=_running(mean, var, counter),
    )


def _find_unsaved(layer: BatchNormLayer) -> tuple[str, ...]:
    """Return the names of mean and variance that are missing from the state dict."""
    module = layer.module
    saved = module._buffers.keys() - module._non_persistent_buffers_set | module._parameters.keys()
    names = (layer.adapter.mean, layer.adapter.var) if layer.is_tracking else ()
    return tuple(name for name in names if name not in saved)


def _running(
    mean: FloatArray | None, var: FloatArray | None, counter: FloatArray | None
) -> RunningStatistics | None:
    if mean is None or var is None:
        return None
    return RunningStatistics(
        mean=mean, var=var, updates=None if counter is None else int(counter.item())
    )


def _idle_children(module: nn.Module) -> tuple[str, ...]:
    """Return the classes of the children that a module, one of PyTorch's own, never calls."""
    return _children(module) if _is_of_torch(module) else ()


def _children(module: nn.Module) -> tuple[str, ...]:
    children = (child for child in module.children() if not isinstance(child, nn.Identity))
    return tuple(type(child).__name__ for child in children)


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")


def _missing_tails(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Return the children that plain layers lack and others at the same place of blocks have.

    The place is the class of the block and the attribute; numbers, as in a list, are left out.
    """
    by_place: dict[tuple[type[nn.Module], str], list[nn.Module]] = {}
    for parent in model.modules():
        for name, module in parent.named_children():
            if isinstance(module, _BatchNorm) and not name.isdigit():
                by_place.setdefault((type(parent), name), []).append(module)
    missing = {}
    for modules in by_place.values():
        tails = [_children(module) for module in modules if not _is_of_torch(module)]
        tail = next(filter(None, tails), ())
        plain = (module for module in modules if _is_of_torch(module) and not _children(module))
        missing.update(dict.fromkeys(plain, tail))
    return missing


def _neighbours(
    model: nn.Module,
) -> tuple[dict[nn.Module, nn.Module], dict[nn.Module, nn.Module]]:
    """Return the module before each other in a ``Sequential``, and the one after it.

    Dropouts that drop nothing are left out.
    """
    pairs = [
        pair
        for parent in model.modules()
        if isinstance(parent, nn.Sequential)
        for pair in itertools.pairwise(
            part
            for part in parent
            if not ("Dropout" in type(part).__name__ and getattr(part, "p", None) == 0.0)
        )
    ]
    return {module: feeder for feeder, module in pairs}, dict(pairs)
