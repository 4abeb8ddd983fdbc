"""What a calibration reads, computes and writes: layer inputs, running statistics, the job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from bnguard.distributed import Ranks
from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer, run_uncompiled
from bnguard.layers.moments import Moments, channel_moments, merge_moments, wide
from bnguard.layers.preserve import (
    preserve_buffers,
    preserve_gradients,
    preserve_modes,
    preserve_random_states,
    preserve_statistics,
)
from bnguard.observe.history import RunningStatistics
from bnguard.observe.layer_description import running_statistics
from bnguard.recalibration.batches import Batch, Forward, call

OnNonfinite = Literal["skip", "error"]
OnInput = Callable[[int, Tensor], None]

# Fewer parts say too little about how they scatter.
_MIN_PARTS = 8
_MOST_PARTS = 64
_PARTS = 16


class ForwardCancelled(BaseException):
    """Raised in a forward to end it; no ``except Exception`` of a model stops it."""


@contextmanager
def read_inputs(layers: Sequence[BatchNormLayer], on_input: OnInput) -> Iterator[None]:
    """Call ``on_input`` with the index of a layer and its input, at each call of the layer.

    The hooks run after those of the user, and so see what the layer sees.
    """

    def hook_for(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            on_input(index, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [
        layer.module.register_forward_pre_hook(hook_for(index), with_kwargs=True)
        for index, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_moments(values: Tensor) -> Moments:
    """Return the moments of a layer's inputs; they are finite if the inputs are.

    Finite values whose squares overflow their dtype are computed again in float64.
    """
    moments = channel_moments(values)
    if not moments.is_finite and bool(torch.isfinite(values).all()):
        return channel_moments(wide(values))
    return moments


def copy_statistics(layer: BatchNormLayer) -> RunningStatistics:
    """Return a copy of the statistics of a layer that has them, on the host."""
    copied = running_statistics(layer.running_mean, layer.running_var, layer.counter)
    assert copied is not None
    return copied


def current_statistics(layer: BatchNormLayer) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance of a layer that has them, each of shape ``(C,)``."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    return mean.detach(), var.detach()


def replace_statistics(layer: BatchNormLayer, mean: Tensor, var: Tensor) -> None:
    """Replace a layer's buffers with new tensors of their dtype that have these values.

    A forward that calls autograd may still need the old tensors.

    Raises:
        CalibrationError: The dtype cannot hold the values.
    """
    (holder, mean_key), (_, var_key), *_ = layer.statistics()
    for key, values in ((mean_key, mean), (var_key, var)):
        holder[key] = fit_to_buffer(values, holder[key], layer.name)


def fit_to_buffer(values: Tensor, buffer: Tensor, layer: str) -> Tensor:
    """Return finite values in the dtype and shape, and on the device, of a buffer.

    Raises:
        CalibrationError: The dtype cannot hold them.
    """
    kept = values.to(device=buffer.device, dtype=buffer.dtype, copy=True).view(buffer.shape)
    if not bool(torch.isfinite(kept).all()):
        is_wide = torch.finfo(buffer.dtype).max >= torch.finfo(torch.float32).max
        raise CalibrationError(
            f"{layer}: the statistics reach {values.abs().max().item():.3g}, which its buffers "
            f"cannot hold in {str(buffer.dtype).removeprefix('torch.')}: "
            + (
                "the weights before it have blown up: go back to an earlier checkpoint"
                if is_wide
                else "keep BN layers in float32"
            )
        )
    return kept


@contextmanager
def prepare_for_calibration(model: nn.Module, layers: Sequence[BatchNormLayer]) -> Iterator[None]:
    """Prepare a model for calibration, and leave it as it was found.

    It is in eval mode, without gradients, and runs as written and not as compiled. Its layers use
    copies of their statistics, without NaN or Inf, so that the originals stay until the result is
    known to be good.
    """
    with (
        preserve_modes(model),
        preserve_random_states(model),
        preserve_buffers(model),
        preserve_gradients(model),
        torch.no_grad(),
        run_uncompiled(),
        preserve_statistics(layers),
    ):
        model.eval()
        for layer in layers:
            mean, var = current_statistics(layer)
            is_good = torch.isfinite(mean) & torch.isfinite(var) & (var >= 0)
            # NaN or Inf would spread to the inputs of the layers after it.
            replace_statistics(layer, mean.where(is_good, 0.0), var.where(is_good, 1.0))
        yield


class CalibrationProgress(Protocol):
    """Receives how far a calibration is, from any thread."""

    def start(self, samples: int, layers: int) -> None:
        """Start again: this many samples will pass this many layers."""

    def advance(self, samples: int) -> None:
        """Report that samples passed one more layer."""


class NoProgress:
    """Shows nothing."""

    def start(self, samples: int, layers: int) -> None:
        """Do nothing."""

    def advance(self, samples: int) -> None:
        """Do nothing."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """Statistics for a layer: mean and unbiased variance, each of shape ``(C,)`` in float64.

    Attributes:
        values: Values per channel that they come from.
    """

    mean: Tensor
    var: Tensor
    values: int


# Takes a layer, the moments of its inputs, and the number of samples they come from.
Estimator = Callable[[BatchNormLayer, Moments, int], Estimate]


def estimate_unbiased(layer: BatchNormLayer, moments: Moments, samples: int) -> Estimate:
    """Estimate the statistics from the moments alone: mean, and variance divided by n - 1.

    Raises:
        CalibrationError: There are fewer than two values per channel.
    """
    if moments.count < 2:
        raise CalibrationError(
            f"{layer.label}: {moments.count} value a channel is too few for a variance: use more "
            "samples"
        )
    return Estimate(moments.mean, moments.var_unbiased, moments.count)


class NonFiniteError(Exception):
    """There is NaN or Inf in the inputs of a layer.

    Attributes:
        index: Index of the layer.
    """

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


class Pool:
    """Moments of each layer's inputs by its index, and the samples and batches that they come from.

    They are kept in at most 64 parts; more are merged in pairs.
    """

    def __init__(self) -> None:
        self.parts: dict[int, list[Moments]] = {}
        self.samples = self.batches = 0

    def add(
        self, inputs: Mapping[int, Iterable[Moments]], samples: int = 0, batches: int = 0
    ) -> None:
        """Add moments, by the index of the layer."""
        self.samples += samples
        self.batches += batches
        for index, moments in inputs.items():
            parts = self.parts.setdefault(index, [])
            parts.extend(moments)
            while len(parts) > _MOST_PARTS:
                parts[:] = [merge_moments(parts[i : i + 2]) for i in range(0, len(parts), 2)]


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A calibration to do.

    Attributes:
        model: The model, in eval mode, with statistics that may be written to.
        noise: How far sums differ in another order, as a share of their terms.
        batches: This rank's share of the data.
        samples: The most samples in that share.
        memory: Bytes that the set may take at once.
        tolerance: Stop at this standard error, as a share of the standard deviation.
    """

    model: nn.Module
    device: torch.device
    noise: float
    layers: tuple[BatchNormLayer, ...]
    batches: Iterator[Batch]
    samples: int
    forward: Forward | None
    estimate: Estimator
    on_nonfinite: OnNonfinite
    memory: int
    tolerance: float | None
    ranks: Ranks
    progress: CalibrationProgress

    def run(self, batch: Batch) -> None:
        """Put a copy of a batch through the model, which may write to it."""
        call(self.model, self.forward, batch.copied())

    def read_moments(self, values: Tensor) -> tuple[Moments, ...]:
        """Return the moments of a layer's inputs; in parts, whose scatter a tolerance needs."""
        parts = values.tensor_split(1 if self.tolerance is None else _PARTS)
        return tuple(input_moments(part).on_host() for part in parts)

    def set_statistics(self, index: int, parts: Sequence[Moments], samples: int) -> None:
        """Give a layer the statistics of its inputs on all ranks.

        Raises:
            NonFiniteError: There is NaN or Inf in the inputs.
            CalibrationError: The layer cannot hold the statistics, or has too few values.
        """
        merged = merge_moments(parts)
        if not merged.is_finite:
            raise NonFiniteError(index)
        layer = self.layers[index]
        estimate = self.estimate(layer, merged, samples)
        replace_statistics(layer, estimate.mean, estimate.var)

    def refuse(self, batch: Batch, layer: BatchNormLayer) -> None:
        """Raise CalibrationError if batches with NaN or Inf are an error."""
        if self.on_nonfinite == "error":
            raise CalibrationError(
                f"batch {batch.index} has NaN or Inf in the inputs of {layer.label}: fix the "
                "data, or skip such batches"
            )

    def estimate_from(self, pool: Pool) -> dict[str, Estimate]:
        """Return the statistics of each layer that was reached, by its name."""
        return {
            self.layers[index].name: self.estimate(
                self.layers[index], merge_moments(parts), pool.samples
            )
            for index, parts in pool.parts.items()
        }


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration:
    """The result of a job, over all ranks.

    Attributes:
        estimates: Statistics for the layers that were reached, by name.
        left_out: Batches left out because of NaN or Inf.
        is_within_tolerance: Whether the standard errors came below the tolerance.
        is_channels_last: Whether images went through the model in that layout.
    """

    estimates: Mapping[str, Estimate]
    samples: int
    batches: int
    virtual_batches: int
    left_out: int
    is_within_tolerance: bool
    is_channels_last: bool = False


def is_precise(inputs: Mapping[int, Sequence[Moments]], tolerance: float) -> bool:
    """Return whether the standard errors of every layer's statistics are within a tolerance.

    ``inputs`` are moments in parts drawn at random, by the layer; the standard errors are those of
    :func:`standard_errors`.
    """
    return all(
        len(parts) >= _MIN_PARTS and bool((torch.cat(standard_errors(parts)) <= tolerance).all())
        for parts in inputs.values()
    )


def standard_errors(parts: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Estimate the standard errors of mean and variance from how parts of a sample scatter.

    The parts are clusters, so that values that belong together, like the pixels of an image, do
    not count as independent: the linearised variance of a ratio of cluster totals (Cochran,
    "Sampling Techniques", 3rd edition 1977, section 6.4).

    Returns:
        That of the mean in standard deviations, and that of the logarithm of the variance, both
        of shape ``(C,)``. It takes at least two parts with values in them.
    """
    filled = [part for part in parts if part.count > 0]
    whole = merge_moments(filled)
    var = whole.var_biased.clamp_min(torch.finfo(torch.float32).tiny)
    weights = torch.tensor([part.count / whole.count for part in filled], dtype=torch.float64)
    offsets = torch.stack([part.mean - whole.mean for part in filled])
    spreads = torch.stack([part.var_biased for part in filled]) + offsets**2 - whole.var_biased
    correction = len(filled) / (len(filled) - 1)
    scatter = (weights[:, None] ** 2 * torch.stack([offsets**2, spreads**2])).sum(1) * correction
    return scatter[0].sqrt() / var.sqrt(), scatter[1].sqrt() / var
