"""What running statistics should be: computed in float64, one layer after the other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from bnguard.layers.bn_layer import find_layers
from bnguard.recalibration.result import Recalibration

Truth = Mapping[str, tuple[np.ndarray, np.ndarray]]


def true_statistics(
    model: nn.Module,
    batches: Sequence[object],
    run: Callable[[nn.Module, object], object] = lambda model, batch: model(batch),
    *,
    order: Iterable[str] | None = None,
) -> Truth:
    """Return mean and unbiased variance of what arrives at each layer in eval mode.

    The whole set runs once for each layer, with the statistics of those before it in place.
    ``order`` names the layers so that none depends on a later one; by default it is their order
    in the model. Give a model in float64 for the truth, or another for that at its precision.
    """
    model = copy.deepcopy(model).eval()
    layers = {layer.name: layer for layer in find_layers(model)}
    truth = {}
    for name in layers if order is None else order:
        arrived: list[Tensor] = []
        handle = layers[name].module.register_forward_pre_hook(
            lambda module, args, kwargs, arrived=arrived: arrived.append(
                (*args, *kwargs.values())[0].detach().double().transpose(0, 1).flatten(1)
            ),
            with_kwargs=True,
        )
        with torch.no_grad():
            for batch in batches:
                run(model, batch)
        handle.remove()
        values = torch.cat(arrived, dim=1).numpy()
        truth[name] = values.mean(1), values.var(1, ddof=1)
        for buffer, value in zip(
            (layers[name].running_mean, layers[name].running_var), truth[name], strict=True
        ):
            buffer.copy_(torch.from_numpy(value))
    return truth


def errors(result: Recalibration, truth: Truth) -> tuple[float, float]:
    """Return how far the statistics of a recalibration are from the truth; see ``distance``."""
    found = {name: (result.after[name].mean, result.after[name].var) for name in truth}
    return distance(found, truth)


def distance(found: Truth, truth: Truth) -> tuple[float, float]:
    """Return the largest shift in standard deviations, and the largest log-variance ratio."""
    shifts, ratios = [], []
    for name, (mean, var) in truth.items():
        shifts.append(np.abs((found[name][0] - mean) / np.sqrt(var)).max())
        ratios.append(np.abs(np.log(found[name][1] / var)).max())
    return float(max(shifts)), float(max(ratios))
