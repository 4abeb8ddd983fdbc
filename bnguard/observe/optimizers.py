"""What the optimizers do to the layers: which are frozen, and whose parameters decay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnguard.layers.bn_layer import BatchNormLayer


class OptimizerProbe:
    """Tells which layers no optimizer trains.

    Args:
        optimizers: What trains the model, as far as that is known.
        layers: The layers as they are when watching begins.
    """

    def __init__(self, optimizers: Iterable[Optimizer], layers: Iterable[BatchNormLayer]) -> None:
        self._optimizers = tuple(optimizers)
        self._affine_at_start: dict[str, list[Tensor]] = {}
        owned = self.owned_parameters()
        for layer in layers:
            self.note_start(layer, owned)

    def note_start(self, layer: BatchNormLayer, owned: set[int]) -> None:
        """Take gamma and beta as they are now for those that training starts from."""
        # Only those that no optimizer has may be frozen by standing still.
        if self.is_left_out(layer, owned):
            self._affine_at_start[layer.name] = [part.detach().clone() for part in layer.affine]

    def owned_parameters(self) -> set[int]:
        """Return the identities of the parameters that an optimizer has."""
        return {
            id(parameter)
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    def trains(self, model: nn.Module) -> bool:
        """Return whether an optimizer has any parameter of the model."""
        owned = self.owned_parameters()
        return any(id(parameter) in owned for parameter in model.parameters())

    def is_left_out(self, layer: BatchNormLayer, owned: set[int]) -> bool:
        """Return whether no optimizer has gamma and beta, where it has others."""
        return bool(owned) and not _are_owned(layer.affine, owned)

    def left_out_at_start(self, layer: BatchNormLayer) -> bool:
        """Return whether no optimizer had gamma and beta when watching began, but had others."""
        return bool(self._affine_at_start.get(layer.name))

    def is_affine_frozen(self, layer: BatchNormLayer, owned: set[int]) -> bool | None:
        """Return whether gamma and beta cannot learn; None where there are none."""
        parameters = layer.affine
        if not parameters:
            return None
        if not any(parameter.requires_grad for parameter in parameters):
            return True
        if not owned or _are_owned(parameters, owned):
            return False
        at_start = self._affine_at_start.get(layer.name, [])
        return len(at_start) == len(parameters) and all(map(_is_same, parameters, at_start))

    def weight_decay(self, layer: BatchNormLayer) -> float | None:
        """Return the largest weight decay on gamma or beta; None where no optimizer has them."""
        own = set(map(id, layer.affine))
        decays = [
            float(group.get("weight_decay", 0.0))
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            if _are_owned(group["params"], own)
        ]
        return max(decays, default=None)


def _are_owned(parameters: Sequence[Tensor], owned: set[int]) -> bool:
    return any(id(parameter) in owned for parameter in parameters)


def _is_same(now: Tensor, before: Tensor) -> bool:
    return now.shape == before.shape and torch.equal(now.detach().to(before), before)
