"""Find out with small forwards whether batches may be joined, and run at once or side by side."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from bnguard.recalibration.batches import Batch, can_be_joined, join_batches
from bnguard.recalibration.layer_inputs import input_moments, read_inputs
from bnguard.recalibration.statistics import Job

# Inputs that depend on other samples differ by far more.
_SAME = 0.05
# In half precision too, some differences must count.
_MAX_NOISE = 0.3
# Samples of small batches that are run to see whether all call the same layers.
_SAMPLES_TO_COMPARE = 16


@dataclass(frozen=True, eq=False)
class Observation:
    """What one batch did in a model.

    Attributes:
        calls: Indices of the layers, in the order in which they were called.
        moments: Moments of the inputs of each layer, over all its calls, by its index.
        starts_threads: Whether a layer was called in a thread that the model started.
        draws_random: Whether the forward drew random numbers from PyTorch.
    """

    calls: tuple[int, ...]
    moments: Mapping[int, Moments]
    starts_threads: bool
    draws_random: bool


def observe(
    job: Job, batch: Batch, look_at: Callable[[Tensor], Tensor] | None = None
) -> Observation:
    """Run a batch through the model, with the same random numbers each time.

    Args:
        job: The job with the model.
        batch: The batch.
        look_at: Selects the rows to read from the inputs of a layer; None for all.
    """
    calls: list[int] = []
    inputs: dict[int, list[Moments]] = {}
    threads = {threading.get_ident()}

    def on_input(index: int, values: Tensor) -> None:
        threads.add(threading.get_ident())
        calls.append(index)
        inputs.setdefault(index, []).append(input_moments(look_at(values) if look_at else values))

    with draw_from_seed(batch.index, job.device) as stream, read_inputs(job.layers, on_input):
        job.run(batch)
    return Observation(
        calls=tuple(calls),
        moments={index: merge_moments(parts) for index, parts in inputs.items()},
        starts_threads=len(threads) > 1,
        draws_random=not stream.is_untouched,
    )


def is_disturbed(
    job: Job, alone: Observation, calls: tuple[int, ...], moments: Mapping[int, Moments]
) -> bool:
    """Return whether samples that run next to others make other calls, or have other inputs.

    A single value per channel has no spread to compare with, so rounding counts in full here, not
    as a share of the tolerance.
    """
    noise = min(job.noise / _SAME, _MAX_NOISE)
    return alone.calls != calls or bool(find_differing_layers(alone.moments, moments, _SAME, noise))


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
        takes_rows: Whether a sample behaves the same with any other in its batch, as far as the
            first two samples show.
        is_channels_last: Whether images should go through in that layout.
        is_stateless: Whether it keeps nothing from one forward to the next and draws no random
            numbers, so that several forwards may run at once.
        starts_threads: Whether it calls BN layers in threads of its own.
        bytes_per_sample: The most memory that a sample takes when it is paused at a layer.
        seconds_per_sample: Duration of a forward.
    """

    calls: tuple[int, ...]
    takes_rows: bool
    is_channels_last: bool
    is_stateless: bool
    starts_threads: bool
    bytes_per_sample: int
    seconds_per_sample: float

    @property
    def is_regular(self) -> bool:
        """Whether every layer is called at most once, in the thread of the forward."""
        return len(set(self.calls)) == len(self.calls) and not self.starts_threads


def find_traits(job: Job, head: Sequence[Batch]) -> ForwardTraits:
    """Run two samples of the first two batches, and one also alone; if that fails, a batch."""
    with suppress(CalibrationError):
        return _find_traits_from_samples(job, *_take_two_samples(head))
    _, traits = _try_forward(job, head[0])
    return traits


def _take_two_samples(head: Sequence[Batch]) -> tuple[Batch, Batch]:
    if len(head) > 1 and can_be_joined(head[0], head[1]):
        return head[0].rows(0, 1), head[1].rows(0, 1)
    if head[0].can_be_cut and head[0].size > 1:
        return head[0].rows(0, 1), head[0].rows(1, 2)
    raise CalibrationError("no two samples go through the model together")


def call_same_layers(job: Job, batches: Iterable[Batch], calls: tuple[int, ...]) -> bool:
    """Return whether the first few small batches make the given calls.

    If they do not, a batch decides which layers it calls, and would for those joined to it.
    """
    left = _SAMPLES_TO_COMPARE
    for batch in batches:
        left -= batch.size
        if left < 0:
            break
        if observe(job, batch).calls != calls:
            return False
    return True


def _find_traits_from_samples(job: Job, first: Batch, second: Batch) -> ForwardTraits:
    both = join_batches([first, second])
    alone = observe(job, second)
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in job.model.modules())
    if has_convolutions and job.device.type == "cpu":  # Those are faster in that layout.
        with suppress(CalibrationError):  # Some models take only one layout.
            seen, traits = _try_forward(job, both.in_channels_last(), _second_half)
            if not is_disturbed(job, alone, seen.calls, seen.moments):
                return replace(traits, takes_rows=True, is_channels_last=True)
    seen, traits = _try_forward(job, both, _second_half)
    return replace(traits, takes_rows=not is_disturbed(job, alone, seen.calls, seen.moments))


def _second_half(values: Tensor) -> Tensor:
    return values[len(values) // 2 :]


def _try_forward(
    job: Job, batch: Batch, look_at: Callable[[Tensor], Tensor] | None = None
) -> tuple[Observation, ForwardTraits]:
    """Run a batch through the model; measure its memory and time, and whether it leaves state."""
    most_held = 0

    def look(values: Tensor) -> Tensor:
        nonlocal most_held
        most_held = max(most_held, live.nbytes)
        return look_at(values) if look_at else values

    state, begin = _read_state(job.model), time.perf_counter()
    with _LiveTensors(job.model) as live:
        seen = observe(job, batch, look)
    seconds = time.perf_counter() - begin
    ours = [values for each in seen.moments.values() for values in (each.mean, each.squares)]
    keeps_state = live.are_left_besides(ours) or not _is_same_state(state, _read_state(job.model))
    return seen, ForwardTraits(
        calls=seen.calls,
        takes_rows=False,
        is_channels_last=False,
        is_stateless=not (keeps_state or seen.draws_random),
        starts_threads=seen.starts_threads,
        bytes_per_sample=(most_held + batch.nbytes) // batch.size + 1,
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


class _LiveTensors(TorchFunctionMode):
    """Tracks which tensors made under it are still alive, apart from those of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        own = _strided([*model.parameters(), *model.buffers()])
        self._own = {tensor.data_ptr() for tensor in own}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the storages that are still alive."""
        self._storages = {
            key: (storage, nbytes)
            for key, (storage, nbytes) in self._storages.items()
            if not storage.expired()  # type: ignore[no-untyped-call]
        }
        return sum(nbytes for _, nbytes in self._storages.values())

    def are_left_besides(self, ours: Iterable[Tensor]) -> bool:
        """Return whether the model keeps a tensor somewhere, such as in the closure of a hook."""
        known = {tensor.untyped_storage()._cdata for tensor in ours}
        if self.nbytes and not self._storages.keys() <= known:
            gc.collect()
        return self.nbytes > 0 and not self._storages.keys() <= known

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in _strided(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._own:
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                self._storages[reference.cdata] = (reference, storage.nbytes())
        return out


def _strided(out: object) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        if out.layout is torch.strided:
            yield out
    elif isinstance(out, (tuple, list)):
        for value in out:
            yield from _strided(value)
