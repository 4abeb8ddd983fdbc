"""Where a distillation computes: on the device that the model is on, or as Lightning says."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnguard.errors import ConfigurationError
from bnguard.layers.bn_layer import device_of


@runtime_checkable
class Engine(Protocol):
    """Device, precision and ranks of a training.

    Lightning's ``Fabric`` is one as it is: the methods are some of its own, so that nothing of
    Lightning is imported here.
    """

    @property
    def device(self) -> torch.device:
        """Device of this process."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the rank that writes files and draws."""

    def to_device(self, module: nn.Module, /) -> Any:
        """Move a module to the device."""

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which networks run."""

    def setup_optimizers(self, optimizer: Optimizer, /) -> Any:
        """Return the optimizer to use in place of this one."""

    def backward(self, loss: Tensor, /) -> None:
        """Compute gradients."""

    def all_reduce(self, values: Tensor, /) -> Any:
        """Return the mean over the ranks."""

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Any,
        *,
        max_norm: float,
        error_if_nonfinite: bool,
    ) -> Tensor | None:
        """Scale the gradients to a norm at most, and return the norm that they had."""


class OwnDevice:
    """One process, with the device and the precision that a model has.

    Attributes:
        device: Device of the model's first parameter.
        world_size: 1.
        is_global_zero: True.
    """

    world_size = 1
    is_global_zero = True

    def __init__(self, model: nn.Module) -> None:
        self.device = device_of(model)

    def to_device(self, module: nn.Module) -> nn.Module:
        """Return the module, which is there; its parts may be on several devices."""
        return module

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()

    def setup_optimizers(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer itself."""
        return optimizer

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the values themselves."""
        return values

    def clip_gradients(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        *,
        max_norm: float,
        error_if_nonfinite: bool,
    ) -> Tensor:
        """Scale the gradients to a norm at most, and return the norm that they had."""
        return nn.utils.clip_grad_norm_(
            module.parameters(), max_norm, error_if_nonfinite=error_if_nonfinite
        )


def engine_of(fabric: Engine | None, model: nn.Module) -> Engine:
    """Return the Fabric given, or what leaves a model where it is.

    Raises:
        ConfigurationError: It is something else.
    """
    if fabric is None:
        return OwnDevice(model)
    if not isinstance(fabric, Engine):
        raise ConfigurationError(f"fabric= takes a Fabric of Lightning, not {fabric!r}")
    return fabric
