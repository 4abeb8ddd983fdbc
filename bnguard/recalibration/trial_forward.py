"""Learn from small forwards how a model has to run, and whether samples disturb each other."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from bnguard.errors import CalibrationError
from bnguard.layers.moments import Moments, merge_moments
from bnguard.layers.preserve import draw_from_seed
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.statistics import Job, input_moments, read_inputs

# Inputs that depend on other samples differ by far more.
_SAME = 0.05
# In half precision too, some differences must count.
_MAX_NOISE = 0.3
# Samples in a trial. A single one may lose its axis in a squeeze.
_TRIAL_SAMPLES = 2
# Functions that tell Python the values of a tensor, on which its next steps may depend.
_READS_VALUES = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"} | {
    f"__{name}__" for name in ("bool", "int", "float", "index", "contains", "array")
}


@dataclass(frozen=True, eq=False)
class Observation:
    """What one batch did in a model.

    Attributes:
        calls: Indices of the layers, in the order in which they were called.
        moments: Moments of the inputs of each layer, over all its calls, by its index.
        starts_threads: Whether a layer was called in a thread that the model started.
    """

    calls: tuple[int, ...]
    moments: Mapping[int, Moments]
    starts_threads: bool


def observe(job: Job, batch: Batch, rows: Callable[[Tensor], Tensor] = lambda x: x) -> Observation:
    """Run a batch through the model, with the same random numbers each time.

    Args:
        job: The job with the model.
        batch: The batch.
        rows: Selects the rows to read from the inputs of a layer.
    """
    calls: list[int] = []
    inputs: dict[int, list[Moments]] = {}
    threads = {threading.get_ident()}

    def on_input(index: int, values: Tensor) -> None:
        threads.add(threading.get_ident())
        calls.append(index)
        inputs.setdefault(index, []).append(input_moments(rows(values)))

    with draw_from_seed(batch.index, job.device), read_inputs(job.layers, on_input):
        job.run(batch)
    return Observation(
        calls=tuple(calls),
        moments={index: merge_moments(parts) for index, parts in inputs.items()},
        starts_threads=len(threads) > 1,
    )


@dataclass(frozen=True, eq=False)
class Witness:
    """Samples that run between others and also alone, to see whether the others disturb them.

    Attributes:
        alone: The samples as they came.
        start: How many of those that they are joined to come before them, as a share of all.
        stop: The same with them.
    """

    alone: Batch
    start: float
    stop: float

    def rows(self, values: Tensor) -> Tensor:
        """Return their rows in the inputs of a layer."""
        return values[round(len(values) * self.start) : round(len(values) * self.stop)]

    def is_disturbed(
        self, job: Job, calls: tuple[int, ...], moments: Mapping[int, Moments]
    ) -> bool:
        """Return whether, alone, they make other calls than these, or have other inputs.

        A single value per channel has no spread to compare with, so rounding counts in full here,
        not as a share of the tolerance.
        """
        noise = min(job.noise / _SAME, _MAX_NOISE)
        alone = observe(job, self.alone)
        differing = find_differing_layers(alone.moments, moments, _SAME, noise)
        return alone.calls != calls or bool(differing)


def find_differing_layers(
    first: Mapping[int, Moments], second: Mapping[int, Moments], tolerance: float, noise: float
) -> set[int]:
    """Return the indices of the layers whose inputs differ.

    Args:
        first: Moments of the inputs of each layer, by its index.
        second: The same of another forward.
        tolerance: How far means may differ in standard deviations, and variances in themselves.
        noise: How far rounding may move them in addition, as a share of the layer's usual values.
    """
    return (first.keys() ^ second.keys()) | {
        index
        for index in first.keys() & second.keys()
        if not _are_close(first[index], second[index], tolerance, noise)
    }


def _are_close(first: Moments, second: Moments, tolerance: float, noise: float) -> bool:
    if first.count != second.count:
        return False
    means = first.mean.cpu().numpy(), second.mean.cpu().numpy()
    variances = first.var_biased.cpu().numpy(), second.var_biased.cpu().numpy()
    usual = np.sqrt(np.mean(np.square(means[0]) + variances[0]))
    scale = np.sqrt(variances[0]) + noise * usual + np.finfo(np.float64).tiny
    return all(
        np.allclose(one / unit, other / unit, rtol=0.0, atol=tolerance, equal_nan=True)
        for (one, other), unit in ((means, scale), (variances, scale**2))
    )


@dataclass(frozen=True)
class ForwardTraits:
    """How a model behaves in a forward.

    Attributes:
        calls: Indices of the layers, in the order in which they are called.
        takes_rows: Whether a few rows of a batch can run without the others.
        reads_values: Whether it lets Python look at values before its last layer, so that a batch
            may decide what is done.
        draws_random: Whether it draws random numbers.
        keeps_state: Whether it keeps something from one forward to the next, so that only one may
            run at a time.
        starts_threads: Whether it calls BN layers in threads of its own.
        is_channels_last: Whether images go through in that layout.
        bytes_per_sample: The most memory that a sample takes.
        seconds_per_sample: Duration of a forward.
    """

    calls: tuple[int, ...]
    takes_rows: bool
    reads_values: bool
    draws_random: bool
    keeps_state: bool
    starts_threads: bool
    is_channels_last: bool
    bytes_per_sample: int
    seconds_per_sample: float

    @property
    def is_regular(self) -> bool:
        """Whether every layer is called at most once, in the thread of the forward."""
        return len(set(self.calls)) == len(self.calls) and not self.starts_threads


def find_traits(job: Job, batch: Batch) -> ForwardTraits:
    """Run two samples of a batch, or all if that fails; in channels-last layout if that is fast."""
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in job.model.modules())
    prefers_channels_last = has_convolutions and job.device.type == "cpu"
    if batch.can_be_cut:
        few = batch.rows(0, _TRIAL_SAMPLES)
        if prefers_channels_last:
            with suppress(CalibrationError):  # Some models take only one layout.
                traits = _try_forward(job, few.in_channels_last())
                return replace(traits, takes_rows=True, is_channels_last=True)
        with suppress(CalibrationError):
            return replace(_try_forward(job, few), takes_rows=True)
    return _try_forward(job, batch)


def _try_forward(job: Job, batch: Batch) -> ForwardTraits:
    """Run a batch through the model; note its memory and time, and what it leaves behind."""
    order: list[int] = []
    threads = {threading.get_ident()}
    reads_values = False

    def on_input(index: int, values: Tensor) -> None:
        nonlocal reads_values
        order.append(index)
        threads.add(threading.get_ident())
        reads_values = calls.read_values

    state, begin = _read_state(job.model), time.perf_counter()
    with (
        draw_from_seed(batch.index, job.device) as stream,
        read_inputs(job.layers, on_input),
        _TrackedCalls(job.model) as calls,
    ):
        job.run(batch)
    seconds = time.perf_counter() - begin
    return ForwardTraits(
        calls=tuple(order),
        takes_rows=False,
        reads_values=reads_values,
        draws_random=not stream.is_untouched,
        keeps_state=calls.leave_tensors or not _is_same_state(state, _read_state(job.model)),
        starts_threads=len(threads) > 1,
        is_channels_last=False,
        bytes_per_sample=(calls.most_bytes + batch.nbytes) // batch.size + 1,
        seconds_per_sample=seconds / batch.size,
    )


def _read_state(model: nn.Module) -> list[tuple[object, int]]:
    """Return all attributes of the modules, tensors with their version."""
    held: list[object] = []
    for module in model.modules():
        for value in vars(module).values():
            held.append(value)
            if isinstance(value, dict):
                held.extend(value.values())
            elif isinstance(value, (list, tuple)):
                held.extend(value)
    return [
        (value, value._version if isinstance(value, Tensor) and not value.is_inference() else 0)
        for value in held
    ]


def _is_same_state(before: list[tuple[object, int]], after: list[tuple[object, int]]) -> bool:
    # Identity, not equality: a value that is restored was still written to.
    return len(before) == len(after) and all(
        old is new and old_version == new_version
        for (old, old_version), (new, new_version) in zip(before, after, strict=True)
    )


class _TrackedCalls(TorchFunctionMode):
    """Tracks the tensors that PyTorch's functions make, apart from those of the model.

    Attributes:
        read_values: Whether Python looked at the values of one.
        most_bytes: The most bytes of storages that were alive at once.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = _find_strided([*model.parameters(), *model.buffers()])
        self._own = {tensor.data_ptr() for tensor in own}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.read_values = False
        self.most_bytes = 0

    def _count_bytes(self) -> int:
        self._storages = {
            key: (storage, nbytes)
            for key, (storage, nbytes) in self._storages.items()
            if not storage.expired()  # type: ignore[no-untyped-call]
        }
        return sum(nbytes for _, nbytes in self._storages.values())

    @property
    def leave_tensors(self) -> bool:
        """Whether the model keeps a tensor somewhere, such as in the closure of a hook."""
        if self._count_bytes():
            gc.collect()
        return self._count_bytes() > 0

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _READS_VALUES:
            self.read_values = True
        for tensor in _find_strided(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._own:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._storages[reference.cdata] = (reference, storage.nbytes())
                self.most_bytes = max(self.most_bytes, self._count_bytes())
        return out


def _find_strided(out: object) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        if out.layout is torch.strided:
            yield out
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _find_strided(value)
