"""What the model is given in training, whichever of its modules the training step calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bnguard.observe.hooks import Hooks

# Is given the floating-point tensors of a call.
InputNote = Callable[[Sequence[Tensor]], None]


class Entrance:
    """Hands on the numbers that a batch of training brings to the model.

    A training step may call the model, or one of its parts (``self.network(x)``) and never the
    model itself; so the modules around the first BN layer are listened to, and of calls inside
    each other the outermost counts.

    Args:
        model: The model.
        notes: What the inputs are handed to.
    """

    def __init__(self, model: nn.Module, notes: Sequence[InputNote]) -> None:
        self.hooks = Hooks()
        self._model = model
        self._notes = notes
        self._path: tuple[nn.Module, ...] = ()

    def follow(self, first: nn.Module) -> None:
        """Listen to the modules that contain this one, the BN layer that is called first."""
        path = tuple(_around(first, self._model)) or (self._model,)
        if path != self._path:
            self._path = path
            self.hooks.close()
            self.hooks.before_outermost(path, self._enter)

    def _enter(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self._model.training and torch.is_grad_enabled():
            inputs = list(_numbers(args, kwargs))
            for note in self._notes:
                note(inputs)


def _around(inner: nn.Module, model: nn.Module) -> Iterator[nn.Module]:
    """Return the modules that contain a module, the outermost first."""
    for module in model.modules():
        if module is not inner and any(part is inner for part in module.modules()):
            yield module


def _numbers(args: tuple[object, ...], kwargs: dict[str, object]) -> Iterator[Tensor]:
    # The usual call has one tensor; to flatten it would cost more than all the rest.
    is_usual = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
    for leaf in args if is_usual else tree_flatten((args, kwargs))[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout is torch.strided:
            yield leaf
