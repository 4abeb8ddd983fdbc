"""Save and restore what a forward changes: modes, statistics, buffers, gradients, random states."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from bnguard.layers.bn_layer import BatchNormLayer

# Running mean, variance and counter by the names of their buffers, by the name of the layer.
SavedStatistics = Mapping[str, Mapping[str, Tensor]]

# Types of devices with a random state of their own.
_DEVICES_WITH_RANDOM_STATE = ("cuda", "xpu", "mps")


@contextmanager
def preserve_modes(model: nn.Module) -> Iterator[None]:
    """Restore the train or eval mode of every module at the end, also after an exception."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        # Not model.train(mode): modules may be in another mode than their parent on purpose.
        for module, training in modes:
            module.training = training


@contextmanager
def preserve_statistics(layers: Iterable[BatchNormLayer]) -> Iterator[None]:
    """Let layers use copies of their running statistics, and restore the originals at the end.

    The layers do not write to the originals, which the user's backward may still need. Writes by
    others, such as DistributedDataParallel, are undone.
    """
    kept = [
        (holder, key, tensor, tensor.detach().clone())
        for layer in layers
        for holder, key, tensor in _statistics(layer)
    ]
    try:
        for holder, key, _, values in kept:
            holder[key] = values.clone()
        yield
    finally:
        _restore(kept)


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Restore all buffers at the end: queues, observers, the user's own averages."""
    kept = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not (is_lazy(buffer) or _is_expanded(buffer))
    ]
    try:
        yield
    finally:
        _restore(kept)


def _restore(kept: Iterable[tuple[dict[str, Any], str, Tensor, Tensor]]) -> None:
    for holder, key, tensor, values in kept:
        # An inference tensor is writable in inference mode only.
        with torch.inference_mode(tensor.is_inference()):
            # .data keeps the version counter, which a backward may check.
            if tensor.shape == values.shape:
                tensor.data.copy_(values)
            else:  # as observers for quantisation resize theirs at the first batch
                tensor.data = values
        holder[key] = tensor


def _is_expanded(buffer: Tensor) -> bool:
    """Return whether elements share memory, so that no forward can write to them."""
    return buffer.layout is torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )


@contextmanager
def preserve_gradients(model: nn.Module) -> Iterator[None]:
    """Remove the gradients of the parameters inside, and restore them at the end."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient


def save_statistics(layers: Iterable[BatchNormLayer]) -> SavedStatistics:
    """Return copies of the running statistics and counters of layers."""
    return {
        layer.name: {key: tensor.detach().clone() for _, key, tensor in _statistics(layer)}
        for layer in layers
    }


def _statistics(layer: BatchNormLayer) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for holder, key in layer.statistics():
        tensor = holder.get(key)
        if isinstance(tensor, Tensor) and not is_lazy(tensor):
            yield holder, key, tensor


@torch.no_grad()
def restore_statistics(layers: Iterable[BatchNormLayer], saved: SavedStatistics) -> None:
    """Write saved statistics to the layers that have some."""
    for layer in layers:
        values = saved.get(layer.name, {})
        for holder, key in layer.statistics():
            if key in values:
                holder[key].copy_(values[key])


def has_statistics(layer: BatchNormLayer, saved: SavedStatistics) -> bool:
    """Return whether a layer has exactly its saved mean and variance."""
    values = saved.get(layer.name, {})
    pairs = [
        (holder[key], values[key])
        for holder, key in layer.statistics()
        if key in values and key != layer.adapter.counter
    ]
    return bool(pairs) and all(torch.equal(own, value.to(own)) for own, value in pairs)


@contextmanager
def preserve_random_states(model: nn.Module) -> Iterator[None]:
    """Restore the random states of torch, NumPy and Python at the end, also after an exception.

    Torch has one for the CPU and one for each accelerator that the model is on.
    """
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    states = RandomStates.now(devices)
    try:
        yield
    finally:
        states.restore()


@dataclass(frozen=True, eq=False)
class RandomStates:
    """The states of the default generators of torch (per device, and the CPU), NumPy and Python."""

    by_device: Mapping[torch.device, Tensor]
    numpy: dict[str, Any]
    python: tuple[Any, ...]

    @classmethod
    def now(cls, devices: Iterable[torch.device]) -> RandomStates:
        """Return the current states, including those of these devices."""
        return cls(
            by_device={device: _read_state(device) for device in _with_random_state(devices)},
            numpy=_numpy_state(),
            python=random.getstate(),
        )

    @classmethod
    def seeded(cls, seed: int, devices: Iterable[torch.device]) -> RandomStates:
        """Return the states after seeding."""
        return cls(
            # torch.manual_seed would also seed devices that start later.
            by_device={
                device: torch.Generator(device).manual_seed(seed).get_state()
                for device in _with_random_state(devices)
            },
            numpy=np.random.RandomState(seed).get_state(legacy=False),
            python=random.Random(seed).getstate(),
        )

    def restore(self) -> None:
        """Let the generators continue from these states."""
        for device, state in self.by_device.items():
            if device.type == "cpu":
                torch.set_rng_state(state)
            elif device.type == "mps":
                torch.mps.set_rng_state(state)
            else:
                torch.get_device_module(device).set_rng_state(state, device)
        # The user may have set another kind of generator in numpy.random.
        if self.numpy["bit_generator"] == _numpy_state()["bit_generator"]:
            np.random.set_state(self.numpy)
        random.setstate(self.python)

    def is_same(self, other: RandomStates) -> bool:
        """Return whether nothing was drawn between these states and others."""
        return (
            self.python == other.python
            and all(
                torch.equal(state, other.by_device[device])
                for device, state in self.by_device.items()
            )
            and all(map(np.array_equal, tree_leaves(self.numpy), tree_leaves(other.numpy)))
        )


class RandomStream:
    """Random numbers from a seed, on the CPU and a device, that continue from use to use."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        self._begin = self._states = RandomStates.seeded(seed, [device])

    @property
    def is_untouched(self) -> bool:
        """Whether nothing was drawn from it."""
        return self._begin.is_same(self._states)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let all code draw from this stream."""
        outside = RandomStates.now([self._device])
        self._states.restore()
        try:
            yield
        finally:
            self._states = RandomStates.now([self._device])
            outside.restore()


@contextmanager
def draw_from_seed(seed: int, device: torch.device) -> Iterator[RandomStream]:
    """Let all code draw from a seed, on the CPU and a device."""
    stream = RandomStream(seed, device)
    with stream.in_use():
        yield stream


def _with_random_state(devices: Iterable[torch.device]) -> list[torch.device]:
    accelerators = {device for device in devices if device.type in _DEVICES_WITH_RANDOM_STATE}
    return [torch.device("cpu"), *sorted(accelerators, key=str)]


def _read_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    if device.type == "mps":
        return torch.mps.get_rng_state()
    state = torch.get_device_module(device).get_rng_state(device)
    assert isinstance(state, Tensor)
    return state


def _numpy_state() -> dict[str, Any]:
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    return state
