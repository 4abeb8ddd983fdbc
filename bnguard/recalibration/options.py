"""Options of the repairs: samples, scores, and which BN layers to work on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Literal, get_args

from torch import nn
from torch.nn.parameter import is_lazy

from bnguard.errors import CalibrationError, ConfigurationError
from bnguard.layers.bn_layer import BatchNormLayer, explain_missing_layers, find_layers, is_wrapper

Score = Callable[[nn.Module], float]
Keep = Literal["if-better", "always"]


def is_whole(number: object, fewest: int) -> bool:
    """Return whether this is a whole number, also one of NumPy, of at least ``fewest``.

    >>> is_whole(2, 1), is_whole(0, 1), is_whole(2.0, 1)
    (True, False, False)
    """
    return isinstance(number, Integral) and int(number) >= fewest


def require_samples(samples: object, fewest: int) -> None:
    """Raise ConfigurationError unless this is a whole number of at least ``fewest``."""
    if not is_whole(samples, fewest):
        raise ConfigurationError(f"samples {samples!r} is not a whole number of at least {fewest}")


def require_score(score: object) -> None:
    """Raise ConfigurationError unless the score is a function or None."""
    if score is not None and not callable(score):
        raise ConfigurationError(f"score={score!r} is not a function: score(model) gives a number")


def require_keep(keep: object) -> None:
    """Raise ConfigurationError unless this is one of the values of :data:`Keep`."""
    if keep not in get_args(Keep):
        known = " or ".join(map(repr, get_args(Keep)))
        raise ConfigurationError(f"keep {keep!r} does not exist: use {known}")


@dataclass(frozen=True)
class SkippedLayer:
    """A BN layer that stays as it was, and why: a clause that has the layer as its subject."""

    name: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """The BN layers of a model: those to work on, and the others."""

    layers: tuple[BatchNormLayer, ...]
    skipped: tuple[SkippedLayer, ...]


def select_layers(model: nn.Module, names: Iterable[str] | None) -> Selection:
    """Return the BN layers whose statistics can be computed again.

    Args:
        model: The model, in the modes that the user set.
        names: Names or patterns (``"backbone.*"``) of the layers; None for all.

    Raises:
        CalibrationError: There is no such layer, or one holds no values yet.
        ConfigurationError: A name or pattern matches no layer.
    """
    found = find_layers(model)
    if not found:
        raise CalibrationError(f"{explain_missing_layers(model)}: nothing to recalibrate")
    patterns = None if names is None else patterns_of("layers", names, found)
    reasons = [(layer, _find_reason_to_skip(layer, model, patterns)) for layer in found]
    chosen = tuple(layer for layer, reason in reasons if reason is None)
    skipped = tuple(SkippedLayer(layer.name, reason) for layer, reason in reasons if reason)
    if not chosen:
        raise CalibrationError(
            f"no BN layer is left to recalibrate: {skipped[0].name} {skipped[0].reason}"
        )
    return Selection(chosen, skipped)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel, DistributedDataParallel and ``torch.compile``."""
    while is_wrapper(model):
        inner = getattr(model, "_orig_mod", None) or model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def patterns_of(option: str, names: object, found: Sequence[BatchNormLayer]) -> tuple[str, ...]:
    """Return the patterns of an option, which may be one string or several.

    Raises:
        ConfigurationError: A pattern matches no layer.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        names = (names,)
    patterns = tuple(map(str, names))
    for pattern in patterns:
        if not any(fnmatchcase(layer.name, pattern) for layer in found):
            raise ConfigurationError(
                f"{option} {pattern!r} matches no BN layer: the first of {len(found)} is "
                f"{found[0].name!r}"
            )
    return patterns


def require_values(layer: BatchNormLayer) -> None:
    """Raise CalibrationError if a layer is lazy, or on the meta device."""
    if is_lazy(getattr(layer.module, layer.adapter.mean)):
        raise CalibrationError(
            f"{layer.label} is lazy and has seen no batch: put one through the model first"
        )
    if layer.running_mean is not None and layer.running_mean.is_meta:
        raise CalibrationError(
            f"{layer.label} is on the meta device and holds no values: load the weights first"
        )


def _find_reason_to_skip(
    layer: BatchNormLayer, model: nn.Module, patterns: Sequence[str] | None
) -> str | None:
    if patterns is not None and not any(fnmatchcase(layer.name, each) for each in patterns):
        return "is not among the layers asked for"
    require_values(layer)
    if not layer.is_tracking:
        return "has no running statistics"
    if layer.adapter.momentum == 0.0:
        return "is of a class that never updates its statistics"
    if model.training and not layer.is_training:
        return "is in eval mode while the model is in train mode"
    return None
