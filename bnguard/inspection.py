"""What can be told of BN layers that do not train: the static rules on models and checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from bnguard.checkpoint import Checkpoint, CheckpointLayer
from bnguard.diagnosis import diagnose
from bnguard.errors import CheckpointError, ConfigurationError
from bnguard.history import History, LayerHistory, Run, RunningStatistics
from bnguard.report import Report
from bnguard.rules import RULES, Rule
from bnguard.stats import FloatArray

if TYPE_CHECKING:
    from torch import Tensor, nn

_STATIC_RULES = tuple(rule for rule in RULES if rule.is_static)


def inspect(
    subject: nn.Module | Mapping[str, Tensor], *, rules: Iterable[Rule] = _STATIC_RULES
) -> Report:
    """Tell what is wrong with the BN layers of a model or a state dict, without running it.

    A state dict does not hold momentum: PyTorch's default of 0.1 is assumed there, and said.

    Args:
        subject: A model, or what its ``state_dict()`` returns.
        rules: The rules to run.

    Raises:
        ConfigurationError: The subject is neither.

    Example:
        >>> from torch import nn
        >>> inspect(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).findings[0].code
        'BN303'
    """
    from torch import nn

    if isinstance(subject, nn.Module):
        layers = _layers_of_model(subject)
    elif isinstance(subject, Mapping):
        layers = _layers_of_state_dict(subject)
    else:
        raise ConfigurationError(
            f"inspect takes a model or a state dict, not a {type(subject).__name__}"
        )
    return _report(layers, rules)


def inspect_checkpoint(checkpoint: Checkpoint, *, rules: Iterable[Rule] = _STATIC_RULES) -> Report:
    """Tell what is wrong with the BN layers of a checkpoint that was read.

    Args:
        checkpoint: What :func:`bnguard.checkpoint.read_checkpoint` returned.
        rules: The rules to run.

    Raises:
        CheckpointError: It holds no BN layers.
    """
    if not checkpoint.layers:
        reason = checkpoint.problems[0] if checkpoint.problems else "it has no BN layers"
        raise CheckpointError(f"{checkpoint.path}: nothing to inspect: {reason}")
    has_several = len(checkpoint.models) > 1
    layers = (
        _layer_of_checkpoint(layer, f"{model.name}: " if has_several else "")
        for model in checkpoint.models
        for layer in model.layers
    )
    return _report(layers, rules)


def _report(layers: Iterable[LayerHistory], rules: Iterable[Rule]) -> Report:
    history = History(layers=tuple(layers), run=Run())
    conclusions = diagnose(history, rules)
    return Report(history, conclusions.findings, conclusions.skipped)


def _layers_of_model(model: nn.Module) -> Iterator[LayerHistory]:
    from bnguard.layers import find_layers

    for layer in find_layers(model):
        affine = [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]
        yield LayerHistory(
            name=layer.name,
            kind=type(layer.module).__name__,
            channels=layer.channels,
            eps=layer.eps,
            momentum=layer.momentum,
            training=layer.is_training,
            is_affine_frozen=not any(part.requires_grad for part in affine) if affine else None,
            has_finite_affine=all(bool(part.isfinite().all()) for part in affine),
            running=_running(layer.running_mean, layer.running_var, layer.counter),
        )


def _layers_of_state_dict(state_dict: Mapping[str, Tensor]) -> Iterator[LayerHistory]:
    for key, mean in state_dict.items():
        prefix = key.removesuffix("running_mean")
        if prefix == key or f"{prefix}running_var" not in state_dict:
            continue
        affine = [
            state_dict[name] for name in (f"{prefix}weight", f"{prefix}bias") if name in state_dict
        ]
        yield LayerHistory(
            name=prefix.removesuffix("."),
            channels=mean.numel(),
            is_momentum_known=False,
            has_finite_affine=all(bool(part.isfinite().all()) for part in affine),
            running=_running(
                mean,
                state_dict[f"{prefix}running_var"],
                state_dict.get(f"{prefix}num_batches_tracked"),
            ),
        )


def _layer_of_checkpoint(layer: CheckpointLayer, model: str) -> LayerHistory:
    affine = [part for part in (layer.weight, layer.bias) if part is not None]
    return LayerHistory(
        name=model + layer.name,
        channels=layer.channels,
        is_momentum_known=False,
        has_finite_affine=all(bool(np.isfinite(part).all()) for part in affine),
        running=RunningStatistics(
            mean=layer.running_mean, var=layer.running_var, updates=layer.counter
        ),
    )


def _running(
    mean: Tensor | None, var: Tensor | None, counter: Tensor | None
) -> RunningStatistics | None:
    if mean is None or var is None:
        return None
    return RunningStatistics(
        mean=_array(mean), var=_array(var), updates=None if counter is None else int(counter)
    )


def _array(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.detach().double().cpu().numpy().copy()
    return array
