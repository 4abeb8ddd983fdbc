"""What a model says of its BN layers without being run, and what changes it between two steps.

Settings, parameters and neighbours of the layers; which optimizers own them; whether weights were
written, a state dict was loaded, or DDP broadcast its buffers; how a model differs from another.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from bnguard.errors import ConfigurationError
from bnguard.layers.bn_layer import BatchNormLayer, find_layers, is_wrapper
from bnguard.layers.distances import FloatArray
from bnguard.layers.moments import wide
from bnguard.layers.names import without_wrappers
from bnguard.observe.history import LayerHistory, RunningStatistics
from bnguard.observe.hooks import Hooks

# Classes whose bias shifts a whole channel, so that BN takes it out again.
_BIASED = (nn.Linear, nn.modules.conv._ConvNd)
# Classes whose outputs have a least and a largest value; ReLU6 is a Hardtanh.
_BOUNDED = (nn.Hardtanh, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.Softsign)
_VERSION = operator.attrgetter("_version")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def describe_layers(model: nn.Module) -> dict[str, LayerHistory]:
    """Return a history a BN layer, by name, that holds what the modules alone tell.

    >>> layers = describe_layers(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    >>> layers["1"].fed_by, layers["1"].is_bias_cancelled
    ('Conv2d', True)
    """
    feeders, bounds, tails = _feeders(model), _bounds(model), _missing_tails(model)
    layers = find_layers(model)
    tensors = [
        tensor
        for layer in layers
        for tensor in (
            layer.weight,
            layer.bias,
            layer.running_mean,
            layer.running_var,
            layer.counter,
        )
    ]
    arrays = iter(on_host(tensors))
    return {
        layer.name: _described(
            layer,
            feeders.get(id(layer.module)),
            bounds.get(id(layer.module)),
            tails.get(id(layer.module), ()),
            *itertools.islice(arrays, 5),
        )
        for layer in layers
    }


def running_statistics(
    mean: Tensor | None, var: Tensor | None, counter: Tensor | None
) -> RunningStatistics | None:
    """Return the running statistics on the host; None where there are none."""
    return _running(*on_host([mean, var, counter]))


def on_host(tensors: Sequence[Tensor | None]) -> list[FloatArray | None]:
    """Return copies of tensors on the host, in float64 and flat, in one transfer a device.

    None for None, and for a tensor that holds no values yet.

    >>> on_host([torch.tensor([1.0, 2.0]), None])
    [array([1., 2.]), None]
    """
    arrays: list[FloatArray | None] = [None] * len(tensors)
    by_device: dict[torch.device, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        if tensor is not None and not tensor.is_meta:
            by_device.setdefault(tensor.device, []).append((place, tensor.detach().view(-1)))
    for parts in by_device.values():
        row = torch.cat([wide(tensor) for _, tensor in parts]).cpu().double().numpy()
        edges = np.cumsum([tensor.numel() for _, tensor in parts])[:-1]
        for (place, _), values in zip(parts, np.split(row, edges), strict=True):
            arrays[place] = values
    return arrays


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

    def follow(self, optimizer: Optimizer) -> None:
        """Count this optimizer in, in the place of those that have parameters of its own."""
        new = parameters_of(optimizer)
        others = (other for other in self._optimizers if not new & parameters_of(other))
        self._optimizers = (*others, optimizer)

    def note_start(self, layer: BatchNormLayer, owned: set[int]) -> None:
        """Take gamma and beta as they are now for those that training starts from."""
        # Only those that no optimizer has may be frozen by standing still.
        if self.is_left_out(layer, owned):
            self._affine_at_start[layer.name] = [part.detach().clone() for part in layer.affine]

    def owned_parameters(self) -> set[int]:
        """Return the identities of the parameters that an optimizer has."""
        return {key for optimizer in self._optimizers for key in parameters_of(optimizer)}

    def trains(self, model: nn.Module) -> bool:
        """Return whether an optimizer has any parameter of the model."""
        owned = self.owned_parameters()
        return any(id(parameter) in owned for parameter in model.parameters())

    def untrained_parts(self, model: nn.Module) -> Iterator[nn.Module]:
        """Yield the largest modules of which nothing is trained, the model itself perhaps.

        Where no optimizer is known, what requires no gradient is not trained.
        """
        trained = self.owned_parameters()
        if not trained:
            parameters = model.parameters()
            trained = {id(parameter) for parameter in parameters if parameter.requires_grad}
        waiting = [model]
        while waiting:
            module = waiting.pop()
            if any(id(parameter) in trained for parameter in module.parameters()):
                waiting.extend(module.children())
            else:
                yield module

    @property
    def are_several(self) -> bool:
        """Whether more than one optimizer trains."""
        return len(self._optimizers) > 1

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


def parameters_of(optimizer: Optimizer) -> set[int]:
    """Return the identities of the parameters that an optimizer has."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


class WeightProbe:
    """Tells whether weights were written to between the newest step and an evaluation.

    Loading, averaging, pruning and rounding do that.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._version = 0
        self._usual_writes = 0
        self._trained: list[Tensor] = []
        self.follow_model()
        self._norms_at_start: dict[int, float] = self._norms(model)

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
        self._version = self.version_now()

    def note_training(self) -> None:
        """Take what was written since the step for a part of it, as the average of a teacher."""
        self._usual_writes = max(self._usual_writes, self.version_now() - self._version)

    def version_now(self) -> int:
        """Return a number that rises with each write to a weight."""
        return sum(map(_VERSION, self._counting))

    def start_anew(self) -> None:
        """Take the weights as they are now for those that watching began with."""
        self._norms_at_start = self._norms(self._model)

    def start_evaluation(self) -> None:
        """Keep gamma and beta as they are before what begins an evaluation."""
        self._trained = self._affine_values()

    def have_changed(self) -> bool:
        """Return whether the weights are others than those of the newest step."""
        if not 0 <= self.version_now() - self._version <= self._usual_writes:
            return True
        # A swap of averaged weights through .data leaves the versions as they are. What is sharded
        # may be here at one time and not at the other, and tells nothing.
        affine = self._affine_values()
        is_comparable = len(affine) == len(self._trained)
        return is_comparable and not all(map(torch.equal, affine, self._trained))

    def have_changed_since_start(self, part: nn.Module) -> bool:
        """Return whether weights of a part of the model are others than when watching began."""
        at_start = self._norms_at_start
        return any(norm != at_start.get(key, norm) for key, norm in self._norms(part).items())

    def _norms(self, part: nn.Module) -> dict[int, float]:
        """Return the norm of each weight, which says whether it was written to, at no memory."""
        counting = set(map(id, self._counting))
        return {
            id(parameter): parameter.detach().float().norm().item()
            for parameter in part.parameters()
            if id(parameter) in counting and not parameter.is_meta
        }

    def _affine_values(self) -> list[Tensor]:
        return [
            part.detach().clone() for layer in find_layers(self._model) for part in layer.affine
        ]


class LoadingProbe:
    """Tells of each layer that a state dict was loaded into, as a part of a model as well.

    Args:
        layers: The layers to watch.
        on_loaded: Called with a layer after it was loaded.
    """

    def __init__(
        self, layers: Iterable[BatchNormLayer], on_loaded: Callable[[BatchNormLayer], None]
    ) -> None:
        self.hooks = Hooks()
        self._on_loaded = on_loaded
        self.follow(layers)

    def follow(self, layers: Iterable[BatchNormLayer]) -> None:
        """Watch these layers from now on."""
        self.hooks.close()
        for layer in layers:
            self.hooks.after_loading(layer.module, self._noted(layer))

    def _noted(self, layer: BatchNormLayer) -> Callable[[object], None]:
        return lambda incompatible_keys: self._on_loaded(layer)


class BroadcastProbe:
    """Tells, on other ranks than 0, when a forward begins, with the buffers as they are by then.

    Args:
        model: The model, wrapped or not; DDP writes the buffers before it calls what it wraps.
        on_forward: Called at each forward, not at those that it makes of itself.
    """

    def __init__(self, model: nn.Module, on_forward: Callable[[], None]) -> None:
        self.hooks = Hooks()
        if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
            inner = next(module for module in model.modules() if not is_wrapper(module))
            self.hooks.before_outermost([inner], lambda args, kwargs: on_forward())


def tensors_of(subject: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights and buffers by name, without what wrappers put before the names."""
    state = subject.state_dict() if isinstance(subject, nn.Module) else subject
    return {
        without_wrappers(name): value.detach()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def weight_change(subject: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Return |weights - reference| / |reference|, Euclidean norms over all that both have.

    Raises:
        ConfigurationError: They have no weight of one name and shape.
    """
    change = size = 0.0
    is_any = False
    for name, value in subject.items():
        other = reference.get(name)
        if other is None or other.shape != value.shape or name.endswith(_STATISTICS):
            continue
        if not (value.is_floating_point() and other.is_floating_point()):
            continue
        is_any = True
        other = other.to("cpu", torch.float64)
        change += (value.to("cpu", torch.float64) - other).square().sum().item()
        size += other.square().sum().item()
    if not is_any:
        raise ConfigurationError(
            "the reference has no weight in common with what is inspected: give the model that it "
            "was averaged, pruned or copied from"
        )
    return math.sqrt(change / size) if size > 0.0 else math.sqrt(change)


def statistics_of(state: Mapping[str, Tensor], layer: str) -> RunningStatistics | None:
    """Return the running statistics of the layer with this name; None where it has none."""
    prefix = f"{layer}." if layer else ""
    mean, var, counter = (state.get(prefix + name) for name in _STATISTICS)
    return running_statistics(mean, var, counter)


def _described(
    layer: BatchNormLayer,
    feeder: nn.Module | None,
    bounded_by: str | None,
    missing_tail: tuple[str, ...],
    gamma: FloatArray | None,
    beta: FloatArray | None,
    mean: FloatArray | None,
    var: FloatArray | None,
    counter: FloatArray | None,
) -> LayerHistory:
    affine, running_mean = layer.affine, layer.running_mean
    return LayerHistory(
        name=layer.name,
        kind=type(layer.module).__name__,
        channels=layer.channels,
        eps=layer.eps,
        momentum=layer.momentum,
        training=layer.is_training,
        is_affine_frozen=not any(part.requires_grad for part in affine) if affine else None,
        is_updating=(
            not layer.adapter.is_frozen and bool(getattr(layer.module, "track_running_stats", True))
        ),
        unsaved=_unsaved(layer),
        fed_by=None if feeder is None else type(feeder).__name__,
        bounded_by=bounded_by,
        is_bias_cancelled=isinstance(feeder, _BIASED) and feeder.bias is not None,
        idle_children=_idle_children(layer.module),
        missing_tail=missing_tail,
        gamma=gamma,
        beta=beta,
        statistics_dtype=(
            None if running_mean is None else str(running_mean.dtype).removeprefix("torch.")
        ),
        running=_running(mean, var, counter),
    )


def _unsaved(layer: BatchNormLayer) -> tuple[str, ...]:
    """Return the names of mean and variance, those that the state dict leaves out."""
    module = layer.module
    saved = module._buffers.keys() - module._non_persistent_buffers_set | module._parameters.keys()
    names = (layer.adapter.mean, layer.adapter.var) if layer.is_tracking else ()
    return tuple(name for name in names if name not in saved)


def _running(
    mean: FloatArray | None, var: FloatArray | None, counter: FloatArray | None
) -> RunningStatistics | None:
    if mean is None or var is None:
        return None
    return RunningStatistics(
        mean=mean, var=var, updates=None if counter is None else int(counter.item())
    )


def _idle_children(module: nn.Module) -> tuple[str, ...]:
    """Return the classes of the children that the module, one of PyTorch's own, never calls."""
    if not type(module).__module__.startswith("torch.nn."):
        return ()
    children = (child for child in module.children() if not isinstance(child, nn.Identity))
    return tuple(type(child).__name__ for child in children)


def _missing_tails(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Return what plain layers lack that those at the same place of other blocks end in.

    The place is the class of the block and the name in it; a number is the name of no place.
    """
    by_place: dict[tuple[type[nn.Module], str], list[nn.Module]] = {}
    for parent in model.modules():
        for name, module in parent.named_children():
            if isinstance(module, _BatchNorm) and not name.isdigit():
                by_place.setdefault((type(parent), name), []).append(module)
    return {
        id(module): tails[0]
        for modules in by_place.values()
        if (tails := [tail for module in modules if (tail := _tail(module))])
        for module in modules
        if type(module).__module__.startswith("torch.nn.") and not _idle_children(module)
    }


def _tail(module: nn.Module) -> tuple[str, ...]:
    """Return the classes of the children that a class of somebody else's calls after BN."""
    if type(module).__module__.startswith("torch.nn."):
        return ()
    children = (child for child in module.children() if not isinstance(child, nn.Identity))
    return tuple(type(child).__name__ for child in children)


def _feeders(model: nn.Module) -> dict[int, nn.Module]:
    """Return the module that feeds another, by its identity, where a ``Sequential`` says so."""
    return {
        id(module): feeder
        for parent in model.modules()
        if isinstance(parent, nn.Sequential)
        for feeder, module in itertools.pairwise(
            part for part in parent if not _drops_nothing(part)
        )
    }


def _drops_nothing(module: nn.Module) -> bool:
    return "Dropout" in type(module).__name__ and getattr(module, "p", None) == 0.0


def _bounds(model: nn.Module) -> dict[int, str]:
    """Return the class of the bounded activation that a module feeds, by its identity."""
    return {
        id(module): type(activation).__name__
        for parent in model.modules()
        if isinstance(parent, nn.Sequential)
        for module, activation in itertools.pairwise(parent)
        if isinstance(activation, _BOUNDED)
    }


def _are_owned(parameters: Sequence[Tensor], owned: set[int]) -> bool:
    return any(id(parameter) in owned for parameter in parameters)


def _is_same(now: Tensor, before: Tensor) -> bool:
    return now.shape == before.shape and torch.equal(now.detach().to(before), before)
