"""Which modules are BN layers, and how to read them: everything else uses BatchNormLayer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnguard.errors import ConfigurationError
from bnguard.layers.names import WRAPPED, layer_label, without_wrappers


def _in_train_mode(module: nn.Module) -> bool:
    return module.training


def _never(module: nn.Module) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Where a class of BN layers keeps its state; for the fields see :func:`register_layer`."""

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
        """Whether the class never updates its statistics."""
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
    """Return how to read modules of a class as BN layers; None if they are not.

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
        counter: Attribute with the number of updates; None if the class keeps none.
        momentum: Attribute with the momentum, or the momentum itself if it is a constant.
        is_momentum_of_old: Whether momentum weighs the *old* value, as in Keras; PyTorch's weighs
            the new one.
        eps: Attribute with eps, or eps itself if it is a constant.
        is_training: Function that returns whether a forward of a module would now use batch
            statistics; by default its ``training`` attribute.

    Raises:
        ConfigurationError: ``cls`` is not a class of modules.

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


@dataclass(frozen=True, eq=False)
class BatchNormLayer:
    """A BN layer of a model.

    Attributes:
        name: Dotted name in the model, ``""`` if the model itself is the layer; the first one if
            the module is in several places.
        module: The module.
        adapter: Where its class keeps the statistics.
    """

    name: str
    module: nn.Module
    adapter: Adapter

    @property
    def label(self) -> str:
        """The name for people: a layer called "1" is "layer 1"."""
        return layer_label(self.name)

    @property
    def running_mean(self) -> Tensor | None:
        """Mean used in eval mode, shape ``(C,)``; None if untracked or not initialised."""
        return self._tensor(self.adapter.mean)

    @property
    def running_var(self) -> Tensor | None:
        """Unbiased variance used in eval mode, shape ``(C,)``; None as for ``running_mean``."""
        return self._tensor(self.adapter.var)

    @property
    def counter(self) -> Tensor | None:
        """``num_batches_tracked``, a scalar that counts updates; None without one."""
        return None if self.adapter.counter is None else self._tensor(self.adapter.counter)

    @property
    def weight(self) -> Tensor | None:
        """Gamma, shape ``(C,)``; None without affine parameters, or if they are sharded."""
        return self._whole(self._affine_name("weight", "gamma"))

    @property
    def bias(self) -> Tensor | None:
        """Beta, shape ``(C,)``; None as for ``weight``."""
        return self._whole(self._affine_name("bias", "beta"))

    @property
    def is_sharded(self) -> bool:
        """Whether this process has only a part of gamma and beta, as under FSDP or ZeRO-3."""
        name = self._affine_name("weight", "gamma")
        return self._tensor(name) is not None and self.weight is None

    @property
    def affine(self) -> list[Tensor]:
        """Gamma and beta as an optimizer has them; empty without affine parameters."""
        names = (self._affine_name("weight", "gamma"), self._affine_name("bias", "beta"))
        return [getattr(self.module, name) for name in names if self._whole(name) is not None]

    @property
    def momentum(self) -> float | None:
        """Weight of the new value in an update; None for a cumulative average."""
        value = self._number(self.adapter.momentum)
        if value is None or not self.adapter.is_momentum_of_old:
            return value
        return 1.0 - value

    def momentum_place(self) -> Iterator[tuple[nn.Module, str]]:
        """Yield module and attribute of the momentum; nothing if it is a constant."""
        if isinstance(self.adapter.momentum, str):
            yield self.module, self.adapter.momentum

    @property
    def eps(self) -> float:
        """The number added to the variance before the square root."""
        return self._number(self.adapter.eps) or 0.0

    @property
    def channels(self) -> int:
        """C, the number of channels; 0 for a lazy layer before its first batch."""
        mean = self.running_mean
        return int(getattr(self.module, "num_features", 0)) if mean is None else mean.numel()

    @property
    def is_tracking(self) -> bool:
        """Whether there are running statistics for eval mode."""
        return self.running_mean is not None and self.running_var is not None

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether a forward would now normalise with batch statistics."""
        return self.is_training or not self.is_tracking

    def normalises(self, values: Tensor) -> bool:
        """Return whether values ``(N, C, *)`` have the channels of the layer."""
        return values.dim() >= 2 and values.shape[1] == self.channels

    @property
    def is_training(self) -> bool:
        """Whether the layer is in train mode."""
        return self.adapter.is_training(self.module)

    @property
    def has_modes(self) -> bool:
        """Whether ``module.training`` sets the mode, as in all but some registered classes."""
        return self.adapter.follows_training

    def statistics(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield the dictionary and the key of mean, variance and counter.

        Reading the dictionary is much cheaper than reading an attribute of the module.
        """
        module = self.module
        for name in (self.adapter.mean, self.adapter.var, self.adapter.counter):
            if name is not None:
                yield (module._buffers if name in module._buffers else vars(module)), name

    def _affine_name(self, usual: str, other: str) -> str:
        """Return the attribute of gamma or beta, which some classes call by the Greek letter."""
        return usual if hasattr(self.module, usual) else other

    def _whole(self, name: str) -> Tensor | None:
        """Return a parameter if this process has all of it; a ``DTensor`` needs a collective."""
        value = self._tensor(name)
        if value is None or value.numel() != self.channels or hasattr(value, "device_mesh"):
            return None
        return value

    def _number(self, attribute: str | float) -> float | None:
        value = getattr(self.module, attribute) if isinstance(attribute, str) else attribute
        return None if value is None else float(value)

    def _tensor(self, name: str) -> Tensor | None:
        value = getattr(self.module, name, None)
        if not isinstance(value, Tensor) or is_lazy(value):
            return None
        return value if value.dim() <= 1 else value.view(-1)


def find_layers(model: nn.Module) -> tuple[BatchNormLayer, ...]:
    """Return the BN layers of a model in the order of registration, each module once.

    Names leave out wrappers: ``DataParallel``, ``DistributedDataParallel``, ``torch.compile``.

    >>> [layer.name for layer in find_layers(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))]
    ['1']
    """
    return tuple(
        BatchNormLayer(without_wrappers(name), module, adapter)
        for name, module in model.named_modules()
        if (adapter := adapter_of(type(module))) is not None
    )


def require_module(model: object, caller: str) -> None:
    """Check that the argument of a function is a module.

    Raises:
        ConfigurationError: It is not.
    """
    if not isinstance(model, nn.Module):
        given = model.__name__ if isinstance(model, type) else type(model).__name__
        what = f"the class {given}: make a model of it" if isinstance(model, type) else given
        raise ConfigurationError(f"{caller} takes a torch.nn.Module, not {what}")


def explain_missing_layers(model: nn.Module) -> str:
    """Return why a model has no BN layers.

    >>> explain_missing_layers(nn.Linear(2, 2))
    'Linear has no BN layers'
    >>> class MyBatchNorm(nn.Module): ...
    >>> explain_missing_layers(MyBatchNorm())[:45]
    'MyBatchNorm has no BN layers that bnguard kno'
    """
    maker = None
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        maker = "compiled by TorchScript"
    # A graph made of functions keeps the statistics as buffers, which torch.fx leaves in layers.
    elif isinstance(model, torch.fx.GraphModule) and "running_mean" in {
        name.rpartition(".")[2] for name, _ in model.named_buffers()
    }:
        maker = "made by torch.export"
    if maker is not None:
        return (
            f"{type(model).__name__} was {maker}, whose layers cannot be read, so give the module "
            "that it was made from"
        )
    kinds = (type(module).__name__ for module in model.modules())
    unknown = next((kind for kind in kinds if "batchnorm" in kind.lower()), None)
    if unknown is None:
        return f"{type(model).__name__} has no BN layers"
    return (
        f"{type(model).__name__} has no BN layers that bnguard knows ({unknown} may be one, for "
        "bnguard.register_layer)"
    )


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first tensor that holds values; the CPU without one."""
    tensors = chain(model.parameters(), model.buffers())
    devices = (tensor.device for tensor in tensors)
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def is_wrapper(module: nn.Module) -> bool:
    """Return whether a module only forwards its calls to the model inside it.

    >>> is_wrapper(nn.DataParallel(nn.Linear(2, 2))), is_wrapper(nn.Linear(2, 2))
    (True, False)
    """
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return True
    held = (getattr(module, name, None) for name in WRAPPED)
    return any(isinstance(inner, nn.Module) for inner in held)


def run_uncompiled() -> AbstractContextManager[object]:
    """Run compiled models in eager mode.

    Compiled code ignores hooks and forwards that were added later, and another mode would make it
    compile again.
    """
    # Nothing can be compiled before this is imported, which takes seconds.
    is_compiling = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if is_compiling else nullcontext()
