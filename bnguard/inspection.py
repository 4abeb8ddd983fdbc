"""Inspecting BN layers that do not train: the static rules on models and checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bnguard.checkpoint import Checkpoint, CheckpointLayer, read_checkpoint
from bnguard.configuration import Configuration, read_configuration
from bnguard.errors import CheckpointError, ConfigurationError, NoBatchNormError
from bnguard.layers.distances import DEFAULT_MOMENTUM
from bnguard.layers.names import without_wrappers
from bnguard.observe.history import History, LayerHistory, Run, RunningStatistics
from bnguard.report import Report
from bnguard.rules import Rule
from bnguard.rules.engine import run_rules

if TYPE_CHECKING:
    from torch import Tensor, nn

# PyTorch's default; a state dict does not hold the eps of a layer.
_DEFAULT_EPS = 1e-5


def inspect(
    subject: nn.Module | Mapping[str, Tensor] | str | Path,
    *,
    reference: nn.Module | Mapping[str, Tensor] | None = None,
    select: Collection[str] | None = None,
    ignore: Collection[str] | None = None,
    per_layer_ignores: Mapping[str, Collection[str]] | None = None,
    limits: Mapping[str, Mapping[str, float]] | None = None,
    rules: Iterable[Rule] | None = None,
) -> Report:
    """Report what is wrong with the BN layers of a model or a checkpoint, without running it.

    A checkpoint file is read without torch and without running code in it. A state dict does not
    hold momentum and eps: they are taken from a reference that is a model. Without one, PyTorch's
    defaults are assumed, and the report says so if a finding depends on them.

    Args:
        subject: A model, what its ``state_dict()`` returns, or the path of a checkpoint.
        reference: The model, or its state dict, that the subject was averaged, pruned, rounded or
            copied from. Reports weights that changed while the statistics did not. Not with a path.
        select: The rules that run, by code, name or prefix of a code (``"BN3"``). This and the
            next three override ``[tool.bnguard]`` of ``pyproject.toml``, as in
            :func:`bnguard.watch`.
        ignore: Rules that do not run, even if they are selected.
        per_layer_ignores: Rules that skip some layers, by glob of the layers' names.
        limits: Limits that replace those of the rules, by rule, then by name.
        rules: The rules to choose from; those that need a training are left out.

    Raises:
        ConfigurationError: Subject or reference has another type, or they have no weight in common;
            or a rule or a limit does not exist.
        CheckpointError: The file cannot be read, or has no BN layers.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, momentum=0.99))
        >>> [str(finding.severity) for finding in inspect(model, select=["BN103"]).findings]
        ['warning']
    """
    configuration = read_configuration().changed(
        select=select, ignore=ignore, per_layer_ignores=per_layer_ignores, limits=limits
    )
    if isinstance(subject, str | Path):
        if reference is not None:
            raise ConfigurationError(
                "reference needs a model or a state dict to compare, not a path: pass what "
                "torch.load returns, or run 'bnguard diff' on two files"
            )
        return inspect_checkpoint(read_checkpoint(subject), configuration, rules)
    import torch
    from torch import nn

    _check_subject("inspect takes a model, a state dict or a path", subject)
    if isinstance(subject, torch.jit.ScriptModule):
        # Its modules cannot be read, but its state dict can.
        subject = subject.state_dict()
    layers: Iterable[LayerHistory] = (
        _layers_of_model(subject)
        if isinstance(subject, nn.Module)
        else _layers_of_state_dict(subject)
    )
    run = Run()
    if reference is not None:
        _check_subject("reference has to be a model or a state dict", reference)
        layers, run = _add_reference(layers, subject, reference)
    return _report(layers, rules, configuration, run)


def inspect_checkpoint(
    checkpoint: Checkpoint,
    configuration: Configuration | None = None,
    rules: Iterable[Rule] | None = None,
) -> Report:
    """Report what is wrong with the BN layers of a checkpoint that was read.

    Args:
        checkpoint: What :func:`bnguard.checkpoint.read_checkpoint` returned.
        configuration: Which rules run, on which layers, with which limits.
        rules: The rules to choose from; those that need a training are left out.

    Raises:
        CheckpointError: It holds no BN layers.
    """
    if not checkpoint.layers:
        kind = CheckpointError if checkpoint.problems else NoBatchNormError
        why = (*checkpoint.problems, "it has no BN layers with running statistics")[0]
        raise kind(f"{checkpoint.path}: nothing to inspect: {why}")
    has_several = len(checkpoint.models) > 1
    run = Run(stored_steps=checkpoint.global_step)
    recalibrated = _find_recalibrated(checkpoint.provenance)
    layers = [
        dataclasses.replace(
            _layer_of_checkpoint(checkpoint, layer),
            name=f"{model.name}: {layer.name}" if has_several else layer.name,
            is_recalibrated=layer.key("running_mean") in recalibrated,
            run=run,
        )
        for model in checkpoint.models
        for layer in model.layers
    ]
    report = _report(layers, rules, configuration or Configuration(), run)
    return dataclasses.replace(report, checkpoint=checkpoint.path)


# Their result does not depend on the statistics from before, unless there is a prior.
_METHODS = ("exact", "precise", "adapt")


def _find_recalibrated(provenance: Mapping[str, object] | None) -> set[str]:
    """Return the entries that a recalibration computed without those from before."""
    keys: set[str] = set()
    while isinstance(provenance, Mapping):
        replaced = provenance.get("replaced")
        is_mixed = provenance.get("method") == "adapt" and provenance.get("prior") != 0.0
        if not is_mixed and provenance.get("method") in _METHODS and isinstance(replaced, list):
            keys.update(key for key in replaced if isinstance(key, str))
        provenance = cast("Mapping[str, object] | None", provenance.get("previous"))
    return keys


def _check_subject(what: str, subject: object) -> None:
    from torch import Tensor, nn

    if isinstance(subject, nn.Module):
        return
    if not isinstance(subject, Mapping):
        raise ConfigurationError(f"{what}, not a {type(subject).__name__}")
    statistics = {key: value for key, value in subject.items() if _is_statistic(key)}
    for key, value in statistics.items():
        if not isinstance(value, Tensor):
            raise ConfigurationError(f"{key} must be a tensor, not a {type(value).__name__}")
    for key, value in subject.items():
        if not statistics and isinstance(value, Mapping) and any(map(_is_statistic, value)):
            raise ConfigurationError(f"{what}; the BN layers are in the entry {key!r}: pass that")


def _is_statistic(key: object) -> bool:
    return str(key).endswith(("running_mean", "running_var"))


def _add_reference(
    layers: Iterable[LayerHistory],
    subject: nn.Module | Mapping[str, Tensor],
    reference: nn.Module | Mapping[str, Tensor],
) -> tuple[list[LayerHistory], Run]:
    """Return the layers and the run, compared with a reference."""
    from torch import nn

    from bnguard.observe.layer_description import statistics_of, tensors_of, weight_change

    if isinstance(reference, nn.Module) and not isinstance(subject, nn.Module):
        layers = _with_settings_of(reference, layers)
    other = tensors_of(reference)
    run = Run(weight_change=weight_change(tensors_of(subject), other))
    return [
        dataclasses.replace(
            layer, run=run, running_of_reference=statistics_of(other, without_wrappers(layer.name))
        )
        for layer in layers
    ], run


def _with_settings_of(model: nn.Module, layers: Iterable[LayerHistory]) -> Iterator[LayerHistory]:
    """Yield the layers of a state dict with eps and momentum as a model has them."""
    from bnguard.observe.layer_description import describe_layers

    described = describe_layers(model)
    for layer in layers:
        same = described.get(without_wrappers(layer.name))
        if same is None:
            yield layer
            continue
        yield dataclasses.replace(
            layer,
            eps=same.eps,
            is_eps_known=True,
            momentum=same.momentum,
            is_momentum_known=True,
            is_updating=same.is_updating,
        )


def _report(
    layers: Iterable[LayerHistory],
    rules: Iterable[Rule] | None,
    configuration: Configuration,
    run: Run,
) -> Report:
    history = History(layers=tuple(layers), run=run)
    static = [rule for rule in configuration.rules(rules) if rule.is_static]
    conclusions = run_rules(history, static, configuration.is_wanted)
    return Report(history, conclusions.findings, conclusions.skipped)


def _layers_of_model(model: nn.Module) -> Iterator[LayerHistory]:
    from torch.optim.swa_utils import AveragedModel

    from bnguard.observe.layer_description import describe_layers

    # An average of counters, rounded down each time, is not a count. Buffers that are not averaged
    # are copied, or written by update_bn, whose plain average forgets the rest.
    is_counting = not isinstance(model, AveragedModel)
    for layer in describe_layers(model).values():
        if is_counting or layer.running is None or layer.running.is_initial:
            yield layer
        else:
            running = dataclasses.replace(layer.running, updates=None)
            yield dataclasses.replace(layer, running=running)


def _layers_of_state_dict(state_dict: Mapping[str, Tensor]) -> Iterator[LayerHistory]:
    from bnguard.observe.layer_description import on_host, running_statistics

    for key, mean in state_dict.items():
        prefix = key.removesuffix("running_mean")
        if prefix == key or f"{prefix}running_var" not in state_dict:
            continue
        var = state_dict[f"{prefix}running_var"]
        if mean.shape != var.shape:
            raise ConfigurationError(
                f"{key} has shape {tuple(mean.shape)}, running_var {tuple(var.shape)}: they belong "
                "to different layers"
            )
        gamma, beta = on_host([state_dict.get(f"{prefix}{name}") for name in ("weight", "bias")])
        yield LayerHistory(
            name=prefix.removesuffix("."),
            channels=mean.numel(),
            eps=_DEFAULT_EPS,
            is_eps_known=False,
            momentum=DEFAULT_MOMENTUM,
            is_momentum_known=False,
            gamma=gamma,
            beta=beta,
            statistics_dtype=str(mean.dtype).removeprefix("torch."),
            running=running_statistics(mean, var, state_dict.get(f"{prefix}num_batches_tracked")),
        )


def _layer_of_checkpoint(checkpoint: Checkpoint, layer: CheckpointLayer) -> LayerHistory:
    momenta = checkpoint.momenta
    eps = layer.eps if layer.eps is not None else checkpoint.eps.get(layer.name)
    return LayerHistory(
        name=layer.name,
        channels=layer.channels,
        eps=_DEFAULT_EPS if eps is None else eps,
        is_eps_known=eps is not None,
        momentum=(
            layer.momentum if layer.is_momentum_known else momenta.get(layer.name, DEFAULT_MOMENTUM)
        ),
        is_momentum_known=layer.is_momentum_known or layer.name in momenta,
        gamma=layer.weight,
        beta=layer.bias,
        is_updating=layer.is_updating,
        statistics_dtype=layer.dtype,
        running=RunningStatistics(
            mean=layer.running_mean, var=layer.running_var, updates=layer.counter
        ),
    )
