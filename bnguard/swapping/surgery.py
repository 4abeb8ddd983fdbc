"""Replacing BN modules in a model, with their hooks, activations and optimizer states."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from bnguard.errors import ConfigurationError
from bnguard.layers.bn_layer import (
    BatchNormLayer,
    adapter_of,
    explain_missing_layers,
    find_layers,
    is_wrapper,
)
from bnguard.layers.moments import wide
from bnguard.recalibration.options import Selection, SkippedLayer, patterns_of
from bnguard.swapping.targets import Target

Replacements = Mapping[nn.Module, nn.Module]

_PLAIN_FORWARDS = {nn.BatchNorm2d.forward, nn.SyncBatchNorm.forward}
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
)
_FUSED_FOR_QUANTISATION = "torch.ao.nn.intrinsic.qat."
# The shapes that a layer may take: (N, C, H, W) first, the most frequent.
_SHAPES = ((4, 4), (4,), (4, 4, 4), ())


def add_tail(norm: nn.Module, layer: BatchNormLayer) -> nn.Module:
    """Return what does all that a layer did: the norm, then the layer's drop and activation.

    Some BN classes end in modules of their own (timm's ``BatchNormAct2d``). Whether a layer is BN
    followed by its children is not guessed from names but tried on random numbers.

    Raises:
        ConfigurationError: The layer does something else besides.
    """
    module = layer.module
    is_plain = type(module).forward in _PLAIN_FORWARDS and "forward" not in vars(module)
    children = {n: c for n, c in module.named_children() if n != "parametrizations"}
    if is_plain:
        tail = {}
    elif _is_norm_then(children, layer):
        tail = children
    elif _is_norm_then({}, layer):
        tail = {}
    else:
        raise ConfigurationError(
            f"{layer.label}: {type(module).__name__} computes more than BN and then its children, "
            f"and would lose it; exclude {layer.name!r}, or pass a "
            "factory"
        )
    if all(isinstance(child, nn.Identity) for child in tail.values()):
        whole = norm
    else:
        name = "norm" if "norm" not in tail else "swapped_norm"
        whole = nn.Sequential(OrderedDict({name: norm, **tail}))
    whole.training = module.training
    norm.training = module.training
    return whole


def replace_modules(model: nn.Module, replacements: Replacements) -> nn.Module:
    """Replace modules wherever they are registered, with their hooks, and return the model.

    If the model is itself one of them, its replacement is returned.
    """
    for old, new in replacements.items():
        _move_hooks(old, new)
    for parent in list(model.modules()):
        if parent in replacements:
            continue
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    return replacements.get(model, model)


def check_reachable(model: nn.Module, replacements: Replacements) -> None:
    """Check that each module is only in places where it can be replaced.

    Raises:
        ConfigurationError: A plain attribute, or a list or dictionary in one, holds one of them
            or a BN layer that is registered nowhere, and the forward may call it from there; or a
            layer fused for quantisation reads it.
    """
    registered = set(model.modules())

    def is_hidden(module: nn.Module) -> bool:
        return module not in registered and adapter_of(type(module)) is not None

    for name, module in model.named_modules():
        is_fused = type(module).__module__.startswith(_FUSED_FOR_QUANTISATION)
        if is_fused and any(child in replacements for child in module.children()):
            raise ConfigurationError(
                f"{name or 'the model'}: {type(module).__name__} reads the statistics of its BN "
                "layer to quantise; swap before the model is prepared for quantisation"
            )
        for attribute, value in vars(module).items():
            if attribute == "_modules":
                continue
            if any(each in replacements or is_hidden(each) for each in _list_held(value)):
                raise ConfigurationError(
                    f"{name or 'the model'} holds a BN layer in .{attribute}, where it cannot "
                    "be replaced: use nn.ModuleList or nn.ModuleDict"
                )


def _move_hooks(old: nn.Module, new: nn.Module) -> None:
    # The dictionaries themselves, since the handles that remove the hooks refer to them.
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook


def _list_held(value: object) -> Iterator[nn.Module]:
    """Yield the modules that a plain attribute holds, itself or in a flat container."""
    values: Iterable[object] = (value,)
    if isinstance(value, dict):
        values = value.values()
    elif isinstance(value, (list, tuple, set)):
        values = value
    for each in values:
        if isinstance(each, nn.Module):
            yield each


def _is_norm_then(children: Mapping[str, nn.Module], layer: BatchNormLayer) -> bool:
    """Return whether a layer in eval mode computes BN and then its children, one after another."""
    trial = BatchNormLayer(layer.name, copy.deepcopy(layer.module).eval(), layer.adapter)
    like = trial.running_mean if trial.running_mean is not None else trial.weight
    with torch.no_grad():
        # Neutral values: a gamma of 0, or statistics of NaN, would hide what follows.
        for tensor, value in (
            (trial.running_mean, 0.0),
            (trial.running_var, 1.0),
            (trial.weight, 1.0),
            (trial.bias, 0.0),
        ):
            if tensor is not None:
                tensor.fill_(value)
        for shape in _SHAPES:
            values = _random_values((4, layer.channels, *shape), like)
            try:
                found = trial.module.forward(values.clone())
            except Exception:
                continue
            return _is_close(found, _normalise_then(children, trial, values))
    return False


def _normalise_then(
    children: Mapping[str, nn.Module], trial: BatchNormLayer, values: Tensor
) -> object:
    expected: object = nn.functional.batch_norm(
        values, trial.running_mean, trial.running_var, training=not trial.is_tracking, eps=trial.eps
    )
    # The copies in the trial: they are in eval mode.
    for name in children:
        expected = trial.module.get_submodule(name)(expected)
    return expected


def _random_values(shape: tuple[int, ...], like: Tensor | None) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    values = 3.0 * torch.randn(shape, generator=generator)
    return values if like is None else values.to(device=like.device, dtype=like.dtype)


def _is_close(found: object, expected: object) -> bool:
    if not (isinstance(found, Tensor) and isinstance(expected, Tensor)):
        return False
    if found.shape != expected.shape:
        return False
    tolerance = 1e-3 if found.dtype in (torch.float32, torch.float64) else 3e-2
    return torch.allclose(wide(found), wide(expected), rtol=tolerance, atol=tolerance)


def plan_swap(
    model: nn.Module, target: Target, names: Iterable[str] | None, exclude: Iterable[str]
) -> Selection:
    """Choose the layers of a model to replace, by the options ``layers`` and ``exclude`` of swap.

    Raises:
        ConfigurationError: There are none, a pattern fits none, one is not initialised, or has
            parameters that are computed from others.
    """
    if is_wrapper(model):
        raise ConfigurationError(
            f"the model is wrapped in {type(model).__name__}: swap the model inside, then wrap it"
        )
    found = find_layers(model)
    if not found:
        raise ConfigurationError(f"{explain_missing_layers(model)}: nothing to swap")
    wanted = ("*",) if names is None else patterns_of("layers", names, found)
    unwanted = patterns_of("exclude", exclude, found)
    layers, skipped = [], []
    for layer in found:
        reason = target.reason_to_skip(layer)
        if any(fnmatchcase(layer.name, pattern) for pattern in unwanted):
            reason = "is excluded"
        elif not any(fnmatchcase(layer.name, pattern) for pattern in wanted):
            reason = "is not among the layers asked for"
        if reason is None:
            _check_parameters(layer)
            layers.append(layer)
        else:
            skipped.append(SkippedLayer(layer.name, reason))
    if not layers:
        raise ConfigurationError(
            f"no BN layer is left to swap: {skipped[0].name} {skipped[0].reason}"
        )
    return Selection(tuple(layers), tuple(skipped))


def _check_parameters(layer: BatchNormLayer) -> None:
    if layer.channels == 0:
        raise ConfigurationError(
            f"{layer.label} is lazy and has seen no batch: put one through the model first"
        )
    for name in ("weight", "bias"):
        # Pruning and the old weight norm make the value a plain attribute.
        if name in vars(layer.module) and any(
            f"{name}_{kind}" in layer.module._parameters for kind in ("orig", "g")
        ):
            raise ConfigurationError(
                f"{layer.label}: its {name} is recomputed at each call, by pruning or a weight "
                "norm: make that permanent first, e.g. with torch.nn.utils.prune.remove"
            )


def _parameters_of(optimizer: torch.optim.Optimizer) -> set[nn.Parameter]:
    """Return all parameters that an optimizer updates."""
    return {p for group in optimizer.param_groups for p in group["params"]}


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Make sure that an optimizer is one of this model.

    Raises:
        ConfigurationError: It is not an optimizer, or updates none of the model's parameters.
    """
    if not hasattr(optimizer, "param_groups"):
        raise ConfigurationError(f"optimizer={optimizer!r} is not an optimizer of torch.optim")
    if not _parameters_of(optimizer) & set(model.parameters()):
        raise ConfigurationError(
            "the optimizer updates none of the model's parameters: give the one that trains it"
        )


def hand_over_parameters(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    successors: Mapping[nn.Parameter, nn.Parameter],
    added: Iterable[tuple[Sequence[nn.Parameter], Sequence[nn.Parameter]]],
) -> None:
    """Make an optimizer update the parameters of another model instead of those that it had.

    Args:
        optimizer: The optimizer; its groups keep their order and options.
        model: The model to update.
        successors: The copy of each old parameter; one without an entry stays itself.
        added: Parameters of a replaced layer with those of its replacement. New ones among these
            join the group that had the old ones, if one had.
    """
    added = list(added)
    alive = set(model.parameters())
    for group in optimizer.param_groups:
        before = group["params"]
        after = [successors.get(p, p) for p in before]
        after = [p for p in after if p in alive]
        known = _parameters_of(optimizer) | set(successors.values())
        for old, new in added:
            if any(p in set(before) for p in old):
                after += [p for p in new if p not in known]
        group["params"] = after
        for old_parameter in before:
            state = optimizer.state.pop(old_parameter, None)
            successor = successors.get(old_parameter, old_parameter)
            if state is not None and successor in alive:
                optimizer.state[successor] = state
