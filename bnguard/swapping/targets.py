"""What BN can be swapped for: a target builds the new layer, and says which layers stay.

A new one is a function that builds a layer, and a line in :data:`TARGETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnguard.errors import ConfigurationError, in_one_line, nearest_name
from bnguard.layers.bn_layer import BatchNormLayer, find_layers
from bnguard.layers.distances import FORGOTTEN_WEIGHT, updates_to_forget
from bnguard.recalibration.options import is_whole
from bnguard.swapping.group_fitting import MIN_VALUES_PER_GROUP
from bnguard.swapping.norms import BatchRenorm, FrozenNorm, GroupNorm

Factory = Callable[[nn.Module], nn.Module]
Groups = int | Mapping[str, int]
# Takes a layer, and the values per channel and sample that reach it, or None if not known.
_GroupsFor = Callable[[BatchNormLayer, int | None], int]

# Wu and He 2018, section 4.1: the number of groups that did best on ImageNet.
_USUAL_GROUPS = 32
# A group of one channel loses the channel's mean: 98.7 % fell to 23.5 % in a DenseNet-like network.
_USUAL_MIN_CHANNELS = 4


@dataclass(frozen=True)
class Target:
    """What takes the place of BN layers.

    Attributes:
        build: Returns the new layer, with the parameters of the old one, which stays as it is.
            Takes the BN layer, and the values per channel and sample that reach it, or None if not
            known. Raises ConfigurationError if the layer cannot be replaced by this target.
        reason_to_skip: Returns why a layer stays as it is; None if it is to be replaced.
    """

    build: Callable[[BatchNormLayer, int | None], nn.Module]
    reason_to_skip: Callable[[BatchNormLayer], str | None] = lambda layer: None


def choose_groups(channels: int, wanted: int, positions: int | None) -> int:
    """Return the largest number of groups, at most ``wanted``, whose groups are large enough.

    Args:
        channels: Channels of the layer; the groups divide them.
        wanted: Groups asked for.
        positions: Values per channel and sample; None if not known: two channels a group then
            make sure that no group has a single value.

    >>> choose_groups(64, 32, 49), choose_groups(48, 32, 49), choose_groups(64, 32, 1)
    (32, 24, 4)
    >>> choose_groups(16, 32, None)
    8
    """
    fewest = MIN_VALUES_PER_GROUP
    if positions is None:
        positions, fewest = 1, 2
    for groups in range(min(wanted, channels), 1, -1):
        if channels % groups == 0 and channels // groups * positions >= fewest:
            return groups
    return 1


def _build_group_norm(
    groups_for: _GroupsFor, layer: BatchNormLayer, positions: int | None
) -> nn.Module:
    groups = groups_for(layer, positions)
    if positions is not None and layer.channels * positions < 2:
        raise _one_value_error(layer)
    norm = GroupNorm(groups, layer.channels, eps=layer.eps, affine=layer.weight is not None)
    take_affine(norm, layer.module)
    return norm


def _groups_at_most(
    groups: int, min_channels: int, layer: BatchNormLayer, positions: int | None
) -> int:
    """Return as many groups as asked for, fewer if they would have too few values or channels."""
    wanted = min(groups, max(1, layer.channels // min_channels))
    return choose_groups(layer.channels, wanted, _at_least(layer, positions))


_usual_groups = partial(_groups_at_most, _USUAL_GROUPS, _USUAL_MIN_CHANNELS)


def _one_per_channel(layer: BatchNormLayer, positions: int | None) -> int:
    """Return the channels, as in instance norm; fewer if a channel has one value per sample."""
    positions = _at_least(layer, positions)
    if positions == 1:
        return choose_groups(layer.channels, layer.channels, positions)
    return layer.channels


def _groups_as_named(
    by_name: Mapping[str, int], layer: BatchNormLayer, positions: int | None
) -> int:
    """Return exactly the groups of the first pattern that fits the layer's name."""
    fitting = (n for pattern, n in by_name.items() if fnmatchcase(layer.name, pattern))
    groups = next(fitting, None)
    if groups is None:
        return _usual_groups(layer, positions)
    if layer.channels % groups or groups == layer.channels * (positions or 2):
        size = "" if positions is None else f" of {positions} value{'s' * (positions != 1)}"
        raise ConfigurationError(
            f"{layer.label}: its {layer.channels} channels{size} do not make {groups} groups of "
            "more than one value; give another number"
        )
    return groups


def _at_least(layer: BatchNormLayer, positions: int | None) -> int | None:
    """Return the values a channel and sample to count on: BatchNorm1d may get (N, C) alone."""
    if positions is not None or not isinstance(layer.module, nn.BatchNorm1d):
        return positions
    if layer.channels == 1:
        raise _one_value_error(layer)
    return 1


def _one_value_error(layer: BatchNormLayer) -> ConfigurationError:
    return ConfigurationError(
        f"{layer.label}: gets one value a sample, which a group norm always sets to 0; leave it "
        f"out with exclude {layer.name!r}, or swap to 'batch-renorm' or 'frozen'"
    )


def _build_renorm(layer: BatchNormLayer, positions: int | None) -> nn.Module:
    """Return a batch renorm that goes on where the layer is."""
    mean, var = _statistics(layer) or _initial_statistics(layer)
    batches = torch.zeros((), dtype=torch.long, device=mean.device)
    if layer.counter is not None:
        batches += layer.counter.to(mean.device)
    norm = BatchRenorm(mean, var, batches, eps=layer.eps, momentum=layer.momentum)
    # Trained statistics need no schedule.
    if bool(batches >= updates_to_forget(layer.momentum, FORGOTTEN_WEIGHT)):
        norm.skip_warm_up()
    take_affine(norm, layer.module)
    return norm


def _build_frozen(layer: BatchNormLayer, positions: int | None) -> nn.Module:
    """Return an affine transform that computes what the layer computes in eval mode."""
    statistics = _statistics(layer)
    if statistics is None:
        raise ConfigurationError(
            f"{layer.label}: has no running statistics to freeze; leave it out with "
            f"exclude {layer.name!r}"
        )
    norm = FrozenNorm(*statistics, layer.eps)
    take_affine(norm, layer.module)
    return norm


def _build_sync(layer: BatchNormLayer, positions: int | None) -> nn.Module:
    """Return a SyncBatchNorm with the statistics of the layer."""
    norm = nn.SyncBatchNorm(
        layer.channels, layer.eps, layer.momentum, affine=False, track_running_stats=False
    )
    statistics = _statistics(layer)
    if statistics is not None:
        counter = layer.counter
        norm.track_running_stats = True
        norm.running_mean, norm.running_var = statistics
        norm.num_batches_tracked = torch.tensor(0) if counter is None else counter.clone()
    norm.affine = layer.weight is not None
    take_affine(norm, layer.module)
    return norm


def _build_with_factory(
    factory: Factory, layer: BatchNormLayer, positions: int | None
) -> nn.Module:
    """Return what a function makes of a BN module, on its device and in its element type."""
    try:
        norm = factory(layer.module)
    except Exception as error:
        raise ConfigurationError(
            f"to= failed for {layer.label}: {in_one_line(error)}: it is called with the BN "
            "layer, and returns the module to put in its place"
        ) from error
    if not isinstance(norm, nn.Module):
        raise ConfigurationError(
            f"to= made a {type(norm).__name__} for {layer.label}, not a torch.nn.Module"
        )
    if find_layers(norm):
        raise ConfigurationError(
            f"to= made a {type(norm).__name__} for {layer.label}, which still is BN; to keep "
            f"the layer, use exclude {layer.name!r}"
        )
    like = layer.weight if layer.weight is not None else layer.running_mean
    if like is not None:
        norm.to(device=like.device, dtype=like.dtype)
    if _has_same_affine(norm, layer.module):
        take_affine(norm, layer.module)
    return norm


def _skip_frozen(layer: BatchNormLayer) -> str | None:
    return None if layer.has_modes else "is frozen, and uses no batch statistics"


def _skip_synchronised(layer: BatchNormLayer) -> str | None:
    if isinstance(layer.module, nn.SyncBatchNorm) and layer.module._modules == {}:
        return "is a SyncBatchNorm already"
    return _skip_frozen(layer)


TARGETS: Mapping[str, Target] = {
    "group": Target(partial(_build_group_norm, _usual_groups)),
    "layer": Target(partial(_build_group_norm, partial(_groups_at_most, 1, 1))),
    "instance": Target(partial(_build_group_norm, _one_per_channel)),
    "batch-renorm": Target(_build_renorm, _skip_frozen),
    "frozen": Target(_build_frozen, lambda layer: None if layer.has_modes else "is frozen already"),
    "sync": Target(_build_sync, _skip_synchronised),
}


def find_target(to: str | Factory, groups: Groups | None) -> Target:
    """Return the target that ``to`` names, or that calls it.

    Raises:
        ConfigurationError: There is no such target, or the groups are not positive numbers.
    """
    numbers = groups.values() if isinstance(groups, Mapping) else [1 if groups is None else groups]
    if not all(is_whole(number, 1) for number in numbers):
        raise ConfigurationError("groups takes whole numbers of at least 1")
    if callable(to):
        return Target(partial(_build_with_factory, to))
    if to not in TARGETS:
        near = nearest_name(str(to), TARGETS)
        hint = f"did you mean {near!r}?" if near else f"use one of {', '.join(TARGETS)}"
        raise ConfigurationError(f"unknown norm {to!r}: {hint}")
    if to != "group" and groups is not None:
        raise ConfigurationError(f"groups are for the norm 'group', not for {to!r}")
    if groups is None:
        return TARGETS[to]
    if isinstance(groups, Mapping):
        return Target(partial(_build_group_norm, partial(_groups_as_named, groups)))
    return Target(partial(_build_group_norm, partial(_groups_at_most, groups, 1)))


def take_affine(norm: nn.Module, module: nn.Module) -> None:
    """Give a norm the very parameters of a BN layer, with what parametrizes them."""
    for name in ("weight", "bias"):
        if parametrize.is_parametrized(module, name):
            _take_parametrized(norm, module, name)
        else:
            norm.register_parameter(name, _as_parameter(getattr(module, name, None)))


def _take_parametrized(norm: nn.Module, module: nn.Module, name: str) -> None:
    norm.register_parameter(name, nn.Parameter(getattr(module, name).detach().clone()))
    parametrizations = module.parametrizations[name]  # type: ignore[index]
    parametrize.register_parametrization(norm, name, nn.Identity())
    norm.parametrizations[name] = parametrizations  # type: ignore[index,operator]


def _as_parameter(value: Tensor | None) -> nn.Parameter | None:
    if value is None or (isinstance(value, nn.Parameter) and value.dim() == 1):
        return value
    # Other people's frozen layers keep buffers here, some of shape (1, C, 1, 1).
    return nn.Parameter(value.detach().reshape(-1), requires_grad=value.requires_grad)


def _has_same_affine(norm: nn.Module, module: nn.Module) -> bool:
    return all(
        isinstance(ours := getattr(norm, name, None), Tensor)
        and isinstance(theirs := getattr(module, name, None), Tensor)
        and ours.shape == theirs.shape
        for name in ("weight", "bias")
    )


def _statistics(layer: BatchNormLayer) -> tuple[Tensor, Tensor] | None:
    mean, var = layer.running_mean, layer.running_var
    return None if mean is None or var is None else (mean.detach().clone(), var.detach().clone())


def _initial_statistics(layer: BatchNormLayer) -> tuple[Tensor, Tensor]:
    like = layer.weight
    device = None if like is None else like.device
    zeros = torch.zeros(layer.channels, device=device, dtype=None if like is None else like.dtype)
    return zeros, torch.ones_like(zeros)
