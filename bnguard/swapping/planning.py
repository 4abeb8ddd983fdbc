"""Which BN layers of a model are swapped, and why the others are not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from bnguard.errors import ConfigurationError
from bnguard.fixes.selection import SkippedLayer, patterns_of
from bnguard.layers import BatchNormLayer, find_layers, is_wrapper, without_layers
from bnguard.swapping.targets import Target


@dataclass(frozen=True)
class Plan:
    """What a swap is to do.

    Attributes:
        layers: The BN layers to replace.
        skipped: Those to leave.
    """

    layers: tuple[BatchNormLayer, ...]
    skipped: tuple[SkippedLayer, ...]


def planned(
    model: nn.Module, target: Target, names: Iterable[str] | None, exclude: Iterable[str]
) -> Plan:
    """Return the layers of a model to replace.

    Args:
        model: The model.
        target: What is to take their place.
        names: Names or patterns of the layers wanted; None for all.
        exclude: Names or patterns of layers to leave.

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
        raise ConfigurationError(f"{without_layers(model)}: nothing to swap")
    wanted = ("*",) if names is None else patterns_of("layers", names, found)
    unwanted = patterns_of("exclude", exclude, found)
    layers, skipped = [], []
    for layer in found:
        reason = _reason_to_skip(layer, wanted, unwanted) or target.reason_to_skip(layer)
        if reason is None:
            _require_own_parameters(layer)
            layers.append(_initialised(layer))
        else:
            skipped.append(SkippedLayer(layer.name, reason))
    if not layers:
        raise ConfigurationError(
            f"no BN layer is left to swap: {skipped[0].name} {skipped[0].reason}"
        )
    return Plan(tuple(layers), tuple(skipped))


def _reason_to_skip(
    layer: BatchNormLayer, wanted: Sequence[str], unwanted: Sequence[str]
) -> str | None:
    if any(fnmatchcase(layer.name, pattern) for pattern in unwanted):
        return "is excluded"
    if not any(fnmatchcase(layer.name, pattern) for pattern in wanted):
        return "is not among the layers asked for"
    return None


def _initialised(layer: BatchNormLayer) -> BatchNormLayer:
    if layer.channels == 0:
        raise ConfigurationError(
            f"{layer.name} is lazy and has seen no batch: put one through the model first"
        )
    return layer


def _require_own_parameters(layer: BatchNormLayer) -> None:
    for name in ("weight", "bias"):
        # So pruning and the old weight norm leave a module: the value is no parameter any more.
        if name in vars(layer.module) and any(
            f"{name}_{kind}" in layer.module._parameters for kind in ("orig", "g")
        ):
            raise ConfigurationError(
                f"{layer.name}: its {name} is computed anew at each call, by pruning or a weight "
                "norm: make that permanent first, with torch.nn.utils.prune.remove, say"
            )
