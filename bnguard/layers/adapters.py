"""How the statistics of a class of BN layers are found: PyTorch's own, and other people's.

A class that is not PyTorch's needs an :class:`Adapter` and nothing else; the ones below are found
by the name of their class, so that the library they come from is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnguard.errors import ConfigurationError


def _in_train_mode(module: nn.Module) -> bool:
    return module.training


def _never(module: nn.Module) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Where a class of BN layers keeps what, and which conventions it follows.

    Attributes:
        mean: Attribute with the running mean: a buffer or a plain tensor, ``(C,)`` or
            broadcastable like ``(1, C, 1, 1)``.
        var: Attribute with the running variance.
        counter: Attribute with the number of updates; None where the class keeps none.
        momentum: Attribute with the momentum, or the momentum itself where it is a constant.
        is_momentum_of_old: Whether momentum weighs the *old* value, as in Keras; PyTorch's weighs
            the new one.
        eps: Attribute with eps, or eps itself where it is a constant.
        is_training: Whether a forward of the module now would use the statistics of its batch.
    """

    mean: str = "running_mean"
    var: str = "running_var"
    counter: str | None = "num_batches_tracked"
    momentum: str | float = "momentum"
    is_momentum_of_old: bool = False
    eps: str | float = "eps"
    is_training: Callable[[nn.Module], bool] = _in_train_mode

    @property
    def follows_training(self) -> bool:
        """Whether the ``training`` attribute alone sets the mode."""
        return self.is_training is _in_train_mode

    @property
    def is_frozen(self) -> bool:
        """Whether the class never updates its statistics, in no mode."""
        return self.is_training is _never


# PyTorch's own classes, SyncBatchNorm, the lazy ones and every subclass.
_ADAPTERS: dict[type[nn.Module], Adapter] = {_BatchNorm: Adapter()}

_FROZEN = Adapter(counter=None, momentum=0.0, is_training=_never)
_ADAPTERS_BY_NAME = {
    "torchvision.ops.misc.FrozenBatchNorm2d": _FROZEN,
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": _FROZEN,
    "timm.layers.norm_act.FrozenBatchNormAct2d": _FROZEN,
}


def adapter_of(cls: type[nn.Module]) -> Adapter | None:
    """Return how modules of a class are read as BN layers, or None where they are none.

    >>> adapter_of(nn.BatchNorm2d) is None, adapter_of(nn.Linear) is None
    (False, True)
    """
    for base in cls.__mro__:
        adapter = _ADAPTERS.get(base) or _ADAPTERS_BY_NAME.get(
            f"{base.__module__}.{base.__qualname__}"
        )
        if adapter is not None:
            return adapter
    return None


def register_layer(
    cls: type[nn.Module],
    *,
    mean: str = "running_mean",
    var: str = "running_var",
    counter: str | None = None,
    momentum: str | float = "momentum",
    is_momentum_of_old: bool = False,
    eps: str | float = "eps",
    is_training: Callable[[nn.Module], bool] = _in_train_mode,
) -> None:
    """Let bnguard treat a class of your own, and its subclasses, as BN layers.

    Subclasses of PyTorch's BN classes need no registration.

    Args:
        cls: The class.
        mean: Attribute with the running mean: a buffer or a plain tensor, ``(C,)`` or
            broadcastable like ``(1, C, 1, 1)``.
        var: Attribute with the running variance.
        counter: Attribute with the number of updates; None where the class keeps none.
        momentum: Attribute with the momentum, or the momentum itself where it is a constant.
        is_momentum_of_old: Whether momentum weighs the *old* value, as in Keras; PyTorch's weighs
            the new one.
        eps: Attribute with eps, or eps itself where it is a constant.
        is_training: Tells of a module whether a forward now would use the statistics of its
            batch; its ``training`` attribute by default.

    Raises:
        ConfigurationError: ``cls`` is no class of modules.

    Example:
        >>> class MyNorm(nn.Module): ...
        >>> register_layer(MyNorm, mean="moving_mean", var="moving_var", momentum=0.9,
        ...                is_momentum_of_old=True, eps=1e-5)
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ConfigurationError(f"register_layer takes a subclass of torch.nn.Module, not {cls!r}")
    _ADAPTERS[cls] = Adapter(
        mean=mean,
        var=var,
        counter=counter,
        momentum=momentum,
        is_momentum_of_old=is_momentum_of_old,
        eps=eps,
        is_training=is_training,
    )
