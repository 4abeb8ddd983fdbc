"""The module in which NaN or Inf first appears.

Hooks on every module search a bounded number of forwards, but only after the running buffers have
shown a bad batch: normal steps cost nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bnguard.layers.names import without_wrappers
from bnguard.observe.history import BadValueOrigin
from bnguard.observe.hooks import Hooks

# Forwards without NaN or Inf after which the search ends.
_MAX_FORWARDS = 200


class OriginProbe:
    """Finds the first module to return an output that is not finite.

    Attributes:
        origin: What was found.
        step: The current step of training.
    """

    def __init__(self, model: nn.Module) -> None:
        self.hooks = Hooks()
        self.origin: BadValueOrigin | None = None
        self.step = 1
        self._model = model
        self._has_begun = False
        self._forwards = 0

    def begin(self) -> None:
        """Look from now on, unless it was done already."""
        if self._has_begun:
            return
        self._has_begun = True
        for name, module in self._model.named_modules():
            self.hooks.after(module, partial(self._look, without_wrappers(name), module))

    @torch.no_grad()
    def _look(self, name: str, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        places = _bad_places(output)
        if places is not None:
            channels, samples = places
            self.origin = BadValueOrigin(
                module=name,
                kind=type(module).__name__,
                channels=channels,
                is_input_bad=_bad_places(args) is not None,
                bad_parameters=_bad_state(module),
                samples=samples,
                step=self.step,
                largest_input=_largest(tree_flatten(args)[0]),
                largest_parameter=_largest(module.parameters(recurse=False)),
            )
        self._forwards += module is self._model
        if places is not None or self._forwards >= _MAX_FORWARDS:
            self.hooks.close()


def _bad_places(tree: object) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return channels and samples of the first tensor that is not finite; None if all are."""
    for leaf in _float_tensors(tree_flatten(tree)[0]):
        bad = ~leaf.detach().isfinite()
        if not bool(bad.any()):
            continue
        if leaf.dim() < 2:
            return (), ()
        return _numbers(bad.transpose(0, 1).flatten(1).any(1)), _numbers(bad.flatten(1).any(1))
    return None


def _largest(leaves: Iterable[object]) -> float | None:
    tensors = _float_tensors(leaves)
    return max((leaf.abs().max().item() for leaf in tensors if leaf.numel()), default=None)


def _float_tensors(leaves: Iterable[object]) -> Iterator[Tensor]:
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.layout is torch.strided:
            yield leaf


def _numbers(flags: Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero().flatten().tolist())


def _bad_state(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the module's own tensors that are not finite."""
    own: list[tuple[str, Tensor]] = [*module.named_parameters(recurse=False)]
    if not module.training:
        # In train mode the batch has already changed the buffers.
        own += module.named_buffers(recurse=False)
    return tuple(name for name, tensor in own if not bool(tensor.isfinite().all()))
