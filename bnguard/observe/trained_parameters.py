"""Which parameters an optimizer trains, and whether anything else writes to the weights."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from bnguard.layers.bn_layer import BatchNormLayer

_VERSION = operator.attrgetter("_version")

# Names of gamma and beta.
_AFFINE = ("weight", "bias", "gamma", "beta")

# The dictionary and the key of a tensor.
_Place = tuple[dict[str, Any], str]


class OptimizerProbe:
    """Finds the layers that no optimizer trains, of those with which watching begins."""

    def __init__(self, optimizers: Iterable[Optimizer], layers: Iterable[BatchNormLayer]) -> None:
        self._optimizers = tuple(optimizers)
        self._affine_at_start: dict[str, list[Tensor]] = {}
        owned = self.owned_parameters()
        for layer in layers:
            self.note_start(layer, owned)

    def follow(self, optimizer: Optimizer) -> None:
        """Add an optimizer; it replaces those that have some of its parameters."""
        new = parameters_of(optimizer)
        others = (other for other in self._optimizers if not new & parameters_of(other))
        self._optimizers = (*others, optimizer)

    def note_start(self, layer: BatchNormLayer, owned: set[int]) -> None:
        """Take the current gamma and beta as those that training starts from."""
        # Parameters that no optimizer has are frozen if they do not change.
        if self.is_left_out(layer, owned):
            self._affine_at_start[layer.name] = [part.detach().clone() for part in layer.affine]

    def owned_parameters(self) -> set[int]:
        """Return the ids of the parameters that an optimizer has."""
        return {key for optimizer in self._optimizers for key in parameters_of(optimizer)}

    def trains(self, model: nn.Module) -> bool:
        """Return whether an optimizer has any parameter of the model."""
        owned = self.owned_parameters()
        return any(id(parameter) in owned for parameter in model.parameters())

    def trains_affine_only(self, layers: Iterable[BatchNormLayer]) -> bool:
        """Return whether the optimizers have gammas and betas of these layers, and nothing else."""
        owned = self.owned_parameters()
        return bool(owned) and owned <= {id(part) for layer in layers for part in layer.affine}

    def untrained_parts(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the largest modules without a trained parameter, perhaps the model itself.

        If no optimizer is known, parameters that require gradients count as trained.
        """
        trained = self.owned_parameters() or {
            id(parameter) for parameter in model.parameters() if parameter.requires_grad
        }
        waiting = [model]
        while waiting:
            module = waiting.pop()
            if any(id(parameter) in trained for parameter in module.parameters()):
                waiting.extend(module.children())
            else:
                yield module

    def fed_by_trained(self, model: nn.Module, layers: Iterable[BatchNormLayer]) -> set[str]:
        """Return the names of the layers that follow trained weights, in order of registration."""
        owned = self.owned_parameters()
        names = {layer.module: layer.name for layer in layers}
        found, is_trained = set(), False
        for module in model.modules():
            if module in names:
                if is_trained:
                    found.add(names[module])
            elif own := list(module.parameters(recurse=False)):
                is_trained = any(p.requires_grad and (not owned or id(p) in owned) for p in own)
        return found

    @property
    def are_several(self) -> bool:
        """Whether more than one optimizer trains."""
        return len(self._optimizers) > 1

    def is_left_out(self, layer: BatchNormLayer, owned: set[int]) -> bool:
        """Return whether the optimizers have parameters, but not this gamma and beta."""
        return bool(owned) and not _are_owned(layer.affine, owned)

    def left_out_at_start(self, layer: BatchNormLayer) -> bool:
        """Return whether the layer was left out when watching began."""
        return bool(self._affine_at_start.get(layer.name))

    def is_affine_frozen(self, layer: BatchNormLayer, owned: set[int]) -> bool | None:
        """Return whether gamma and beta cannot learn; None without them."""
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
        """Return the largest weight decay on gamma or beta; None if no optimizer trains them."""
        own = {id(part) for part in layer.affine if part.requires_grad}
        decays = [
            float(group.get("weight_decay", 0.0))
            for optimizer in self._optimizers
            for group in optimizer.param_groups
            if _are_owned(group["params"], own)
        ]
        return max(decays, default=None)


def parameters_of(optimizer: Optimizer) -> set[int]:
    """Return the ids of the parameters that an optimizer has."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


class WeightProbe:
    """Finds out whether something other than a training step wrote to the weights.

    Loading, averaging, pruning and rounding do.
    """

    def __init__(self, model: nn.Module, layers: Iterable[BatchNormLayer]) -> None:
        self._model = model
        self._version = 0
        self._is_after_step = False
        self._usual_writes = 0
        self._trained: list[Tensor] = []
        self.follow_model(layers)
        self._places: dict[nn.Parameter, int] = {}
        self._are_moved_by_training = False
        self._norms_at_start: dict[int, float] = self._norms(model)

    def follow_model(self, layers: Iterable[BatchNormLayer]) -> None:
        """Notice parameters that were added or removed; these are the BN layers now."""
        self._layers = layers
        # Inference tensors do not count how often they were written to.
        self._counting = [
            parameter
            for parameter in self._model.parameters()
            if not (is_lazy(parameter) or parameter.is_inference())
        ]
        watched = [layer for layer in layers if not layer.is_sharded]
        self._affine_places = [place for layer in watched for place in _affine_places(layer)]
        self._statistics_places = [
            place for layer in watched for place in list(layer.statistics())[:2]
        ]

    def note_step(self) -> None:
        """Take the current weights as those of the newest step.

        Cheap enough for every step: a sum of counters that rise with each in-place write.
        """
        self._version = self._version_now()
        self._is_after_step = True

    def note_places(self) -> None:
        """Note where the weights lie in memory after a training step."""
        self._are_moved_by_training = self._are_moved_by_training or self._are_elsewhere()
        # Sharded parameters are of another class, and have no place of their own.
        self._places = {
            parameter: parameter.data_ptr()
            for parameter in self._counting
            if type(parameter) is nn.Parameter and not parameter.is_meta
        }

    def _are_elsewhere(self) -> bool:
        """Return whether weights lie elsewhere than noted, as after a swap through ``.data``."""
        return any(parameter.data_ptr() != place for parameter, place in self._places.items())

    def note_training(self) -> None:
        """Take the writes since the step as part of each step, as those to an averaged teacher.

        Called before each forward of training; an evaluation may come between.
        """
        if self._is_after_step:
            self._usual_writes = max(self._usual_writes, self._version_now() - self._version)
        self._is_after_step = False

    def note_evaluation(self) -> None:
        """Take what was written since the step as part of an evaluation, not of each step."""
        self._is_after_step = False

    def state_now(self) -> tuple[object, object]:
        """Return what changes with any weight, and what with any statistic of the BN layers.

        It is read at each forward of an evaluation, and has to be cheap.
        """
        weights = (self._version_now(), _versions(self._affine_places))
        return weights, _versions(self._statistics_places)

    def _version_now(self) -> int:
        """Return a number that rises with each in-place write to a weight."""
        return sum(map(_VERSION, self._counting))

    def start_anew(self) -> None:
        """Take the current weights as those at the start."""
        self._norms_at_start = self._norms(self._model)

    def start_evaluation(self) -> None:
        """Keep gamma and beta as they are before an evaluation."""
        self._trained = self._affine_values()

    def have_changed(self) -> bool:
        """Return whether the weights differ from those of the newest step."""
        if not 0 <= self._version_now() - self._version <= self._usual_writes:
            return True
        # A swap of averaged weights through .data does not change the counters.
        if not self._are_moved_by_training and self._are_elsewhere():
            return True
        # Sharded parameters may be here at one time only and are not compared.
        affine = self._affine_values()
        is_comparable = len(affine) == len(self._trained)
        return is_comparable and not all(map(torch.equal, affine, self._trained))

    def have_changed_since_start(self, part: nn.Module) -> bool:
        """Return whether weights of a part of the model differ from those at the start."""
        at_start = self._norms_at_start
        return any(norm != at_start.get(key, norm) for key, norm in self._norms(part).items())

    def _norms(self, part: nn.Module) -> dict[int, float]:
        """Return the norm of each weight by id, which shows a change without a copy."""
        counting = set(map(id, self._counting))
        return {
            id(parameter): parameter.detach().float().norm().item()
            for parameter in part.parameters()
            if id(parameter) in counting and not parameter.is_meta
        }

    def _affine_values(self) -> list[Tensor]:
        return [part.detach().clone() for layer in self._layers for part in layer.affine]


def _are_owned(parameters: Sequence[Tensor], owned: set[int]) -> bool:
    return any(id(parameter) in owned for parameter in parameters)


def _is_same(now: Tensor, before: Tensor) -> bool:
    return now.shape == before.shape and torch.equal(now.detach().to(before), before)


def _affine_places(layer: BatchNormLayer) -> list[_Place]:
    parameters = layer.module._parameters
    return [(parameters, name) for name in _AFFINE if name in parameters]


def _versions(places: Iterable[_Place]) -> list[tuple[int, int]]:
    """Return how often the tensors were written to, and where they lie."""
    tensors = (holder.get(name) for holder, name in places)
    return [
        (tensor._version, tensor.data_ptr())
        for tensor in tensors
        if isinstance(tensor, Tensor)
        and not (is_lazy(tensor) or tensor.is_inference() or tensor.is_meta)
    ]
