"""What BN can be swapped for: a target says which layers it leaves alone, and builds the others.

A new one is a class with the two methods of :class:`Target`, and a line in :func:`find_target`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bnguard.errors import ConfigurationError, in_one_line, nearest_name
from bnguard.layers.bn_layer import BatchNormLayer, find_layers
from bnguard.layers.distances import FORGOTTEN_WEIGHT, updates_to_forget
from bnguard.layers.preserve import preserve_modes, preserve_random_states
from bnguard.recalibration.batches import Batch, Forward, call
from bnguard.recalibration.layer_inputs import read_inputs
from bnguard.recalibration.options import is_whole
from bnguard.swapping.group_fitting import MIN_VALUES_PER_GROUP
from bnguard.swapping.norms import BatchRenorm, FrozenNorm, GroupNorm, RenormSchedule


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


def measure_positions(
    model: nn.Module, layers: Sequence[BatchNormLayer], forward: Forward | None, sample: Batch
) -> tuple[Mapping[str, int], object]:
    """Return the values per channel and sample that reach each layer, the fewest of its calls.

    Layers that the sample does not reach are left out. The second value is what the model, in
    eval mode, returned.
    """
    positions: dict[str, int] = {}

    def measure(index: int, values: Tensor) -> None:
        name, here = layers[index].name, values.shape[2:].numel()
        positions[name] = min(here, positions.get(name, here))

    with read_inputs(layers, measure):
        return positions, run_in_eval_mode(model, forward, sample)


def run_in_eval_mode(model: nn.Module, forward: Forward | None, batch: Batch) -> object:
    """Return what a model gives for a batch in eval mode; the model stays as it is."""
    with preserve_modes(model), preserve_random_states(model), torch.no_grad():
        model.eval()
        return call(model, forward, batch)


Factory = Callable[[nn.Module], nn.Module]
Groups = int | Mapping[str, int]

# Wu and He 2018, section 4.1: the number of groups that did best on ImageNet.
_USUAL_GROUPS = 32
# A group of one channel loses the channel's mean: 98.7 % fell to 23.5 % in a DenseNet-like network.
_USUAL_MIN_CHANNELS = 4


class Target(Protocol):
    """What takes the place of BN layers."""

    def reason_to_skip(self, layer: BatchNormLayer) -> str | None:
        """Return why a layer stays as it is; None if it is to be replaced."""

    def build(self, layer: BatchNormLayer, positions: int | None) -> nn.Module:
        """Return the new layer, with the parameters of the old one, which stays as it is.

        Args:
            layer: The BN layer.
            positions: Values per channel and sample that reach it; None if not known.

        Raises:
            ConfigurationError: The layer cannot be replaced by this target.
        """


@dataclass(frozen=True)
class GroupTarget:
    """Group normalisation, and layer and instance normalisation, which are its two ends.

    Attributes:
        groups_for: Returns the groups of a layer, given the values per channel and sample that
            reach it.
    """

    groups_for: Callable[[BatchNormLayer, int | None], int]

    def reason_to_skip(self, layer: BatchNormLayer) -> str | None:
        """Leave no layer alone."""
        return None

    def build(self, layer: BatchNormLayer, positions: int | None) -> nn.Module:
        """Return a group norm with as many groups as there are values for."""
        groups = self.groups_for(layer, positions)
        if positions is not None and layer.channels * positions < 2:
            raise _one_value_error(layer)
        affine = layer.weight is not None
        norm = GroupNorm(groups, layer.channels, eps=layer.eps, affine=affine)
        take_affine(norm, layer.module)
        return norm


@dataclass(frozen=True)
class AtMost:
    """As many groups as asked for, fewer where they would have too few values or channels."""

    groups: int
    min_channels: int = 1

    def __call__(self, layer: BatchNormLayer, positions: int | None) -> int:
        """Return as many groups as there are values for."""
        wanted = min(self.groups, max(1, layer.channels // self.min_channels))
        return choose_groups(layer.channels, wanted, _at_least(layer, positions))


@dataclass(frozen=True)
class OnePerChannel:
    """Instance normalisation; fewer groups where a channel has one value a sample."""

    def __call__(self, layer: BatchNormLayer, positions: int | None) -> int:
        """Return the channels, or fewer groups."""
        positions = _at_least(layer, positions)
        if positions == 1:
            return choose_groups(layer.channels, layer.channels, positions)
        return layer.channels


@dataclass(frozen=True)
class AsNamed:
    """Exactly the groups that the first pattern gives that fits the name of the layer."""

    groups: Mapping[str, int]
    otherwise: AtMost

    def __call__(self, layer: BatchNormLayer, positions: int | None) -> int:
        """Return the groups given; raise a ConfigurationError where they cannot be."""
        fitting = (n for pattern, n in self.groups.items() if fnmatchcase(layer.name, pattern))
        groups = next(fitting, None)
        if groups is None:
            return self.otherwise(layer, positions)
        if layer.channels % groups or groups == layer.channels * (positions or 2):
            size = "" if positions is None else f" of {positions} value{'s' * (positions != 1)}"
            raise ConfigurationError(
                f"{layer.name}: its {layer.channels} channels{size} do not make {groups} groups of "
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
        f"{layer.name}: gets one value a sample, which a group norm always sets to 0; leave it "
        f"out with exclude {layer.name!r}, or swap to 'batch-renorm' or 'frozen'"
    )


@dataclass(frozen=True)
class RenormTarget:
    """Batch renormalisation, from the running statistics that the layer has.

    Attributes:
        schedule: The schedule for layers without trained statistics; the others need none.
    """

    schedule: RenormSchedule

    def reason_to_skip(self, layer: BatchNormLayer) -> str | None:
        """Leave layers alone that never use the statistics of a batch."""
        return None if layer.has_modes else "is frozen, and uses no batch statistics"

    def build(self, layer: BatchNormLayer, positions: int | None) -> nn.Module:
        """Return a batch renorm that goes on where the layer is."""
        mean, var = _statistics(layer) or _initial_statistics(layer)
        counter = layer.counter
        batches = torch.zeros((), dtype=torch.long, device=mean.device)
        if counter is not None:
            batches += counter.to(mean.device)
        norm = BatchRenorm(
            mean,
            var,
            batches,
            eps=layer.eps,
            momentum=layer.momentum,
            schedule=self.schedule,
        )
        if bool(batches >= updates_to_forget(layer.momentum, FORGOTTEN_WEIGHT)):
            norm.skip_warm_up()
        take_affine(norm, layer.module)
        return norm


@dataclass(frozen=True)
class FrozenTarget:
    """The running statistics as constants."""

    def reason_to_skip(self, layer: BatchNormLayer) -> str | None:
        """Leave layers alone whose statistics are constants already."""
        return None if layer.has_modes else "is frozen already"

    def build(self, layer: BatchNormLayer, positions: int | None) -> nn.Module:
        """Return an affine transform that computes what the layer computes in eval mode."""
        statistics = _statistics(layer)
        if statistics is None:
            raise ConfigurationError(
                f"{layer.name}: has no running statistics to freeze; leave it out with "
                f"exclude {layer.name!r}"
            )
        norm = FrozenNorm(*statistics, layer.eps)
        take_affine(norm, layer.module)
        return norm


@dataclass(frozen=True)
class SyncTarget:
    """BN over the batches of all ranks."""

    def reason_to_skip(self, layer: BatchNormLayer) -> str | None:
        """Leave layers alone that share statistics already, or have none of a batch."""
        if isinstance(layer.module, nn.SyncBatchNorm) and layer.module._modules == {}:
            return "is a SyncBatchNorm already"
        return None if layer.has_modes else "is frozen, and uses no batch statistics"

    def build(self, layer: BatchNormLayer, positions: int | None) -> nn.Module:
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


@dataclass(frozen=True)
class FactoryTarget:
    """What a function makes of a BN layer.

    Attributes:
        factory: ``factory(bn)`` returns the module to put in place of the BN module.
    """

    factory: Factory

    def reason_to_skip(self, layer: BatchNormLayer) -> str | None:
        """Leave no layer alone."""
        return None

    def build(self, layer: BatchNormLayer, positions: int | None) -> nn.Module:
        """Return what the factory makes, on the layer's device and in its element type."""
        try:
            norm = self.factory(layer.module)
        except Exception as error:
            raise ConfigurationError(
                f"to= failed for {layer.name}: {in_one_line(error)}: it is called with the BN "
                "layer, and returns the module to put in its place"
            ) from error
        if not isinstance(norm, nn.Module):
            raise ConfigurationError(
                f"to= made a {type(norm).__name__} for {layer.name}, not a torch.nn.Module"
            )
        if find_layers(norm):
            raise ConfigurationError(
                f"to= made a {type(norm).__name__} for {layer.name}, which still is BN; to keep "
                f"the layer, use exclude {layer.name!r}"
            )
        like = layer.weight if layer.weight is not None else layer.running_mean
        if like is not None:
            norm.to(device=like.device, dtype=like.dtype)
        if _has_same_affine(norm, layer.module):
            take_affine(norm, layer.module)
        return norm


_USUAL = AtMost(_USUAL_GROUPS, _USUAL_MIN_CHANNELS)
TARGETS: Mapping[str, Callable[[], Target]] = {
    "group": lambda: GroupTarget(_USUAL),
    "layer": lambda: GroupTarget(AtMost(1)),
    "instance": lambda: GroupTarget(OnePerChannel()),
    "batch-renorm": lambda: RenormTarget(RenormSchedule()),
    "frozen": FrozenTarget,
    "sync": SyncTarget,
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
        return FactoryTarget(to)
    if to not in TARGETS:
        near = nearest_name(str(to), TARGETS)
        hint = f"did you mean {near!r}?" if near else f"use one of {', '.join(TARGETS)}"
        raise ConfigurationError(f"unknown norm {to!r}: {hint}")
    if to != "group" and groups is not None:
        raise ConfigurationError(f"groups are for the norm 'group', not for {to!r}")
    if groups is None:
        return TARGETS[to]()
    return GroupTarget(AsNamed(groups, _USUAL) if isinstance(groups, Mapping) else AtMost(groups))


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
