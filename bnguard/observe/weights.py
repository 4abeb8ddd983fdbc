"""Whether the weights are those that the newest step left, when an evaluation begins."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnguard.layers.bn_layer import find_layers

_VERSION = operator.attrgetter("_version")


class WeightProbe:
    """Tells whether weights were written to between the newest step and an evaluation.

    Loading, averaging, pruning and rounding do that.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._version = 0
        self._trained: list[Tensor] = []
        self.follow_model()
        self._norms_at_start = self._norms()

    def follow_model(self) -> None:
        """Notice parameters that were added or removed."""
        # Inference tensors do not count how often they were written to.
        self._counting = [
            parameter
            for parameter in self._model.parameters()
            if not (is_lazy(parameter) or parameter.is_inference())
        ]

    def note_step(self) -> None:
        """Take the weights as those that a step has left; done at each, so that it has to be cheap.

        That is a sum of numbers that rise whenever a parameter is written to in place.
        """
        self._version = sum(map(_VERSION, self._counting))

    def start_evaluation(self) -> None:
        """Keep gamma and beta as they are before what begins an evaluation."""
        self._trained = self._affine_values()

    def have_changed(self) -> bool:
        """Return whether the weights are others than those of the newest step."""
        if sum(map(_VERSION, self._counting)) != self._version:
            return True
        # A swap of averaged weights through .data leaves the versions as they are. What is sharded
        # may be here at one time and not at the other, and tells nothing.
        affine = self._affine_values()
        is_comparable = len(affine) == len(self._trained)
        return is_comparable and not all(map(torch.equal, affine, self._trained))

    def have_changed_since_start(self) -> bool:
        """Return whether the weights are others than when watching began."""
        return self._norms() != self._norms_at_start

    def _norms(self) -> list[float]:
        """Return the norm of each weight, which says whether it was written to, at no memory."""
        return [
            parameter.detach().float().norm().item()
            for parameter in self._counting
            if not parameter.is_meta
        ]

    def _affine_values(self) -> list[Tensor]:
        return [
            part.detach().clone() for layer in find_layers(self._model) for part in layer.affine
        ]
