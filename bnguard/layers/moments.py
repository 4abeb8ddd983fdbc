"""Moments of tensors of shape ``(N, C, *)`` (samples, channels, positions), on their device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Beyond this, sums in float32 can cost the variance 1e-5 of itself.
_MAX_MEAN_IN_STD = 4.0
# Values summed in float32 before float64 takes over.
_BLOCK = 2**13
# Fewer along rows: squares of rounded values, as in half precision, all err to one side.
_ROW_BLOCK = 2**10
# Values read at a time.
_PIECE = 2**22
# Channels that PyTorch's kernel needs to run at the speed of memory on channels-last data.
_FAST_CHANNELS = 64
# Types of devices without float64: Apple's.
_WITHOUT_FLOAT64 = frozenset({"mps"})


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and sum of squared deviations of a sample, a value per channel.

    Attributes:
        count: Values per channel, n; the same for every channel.
        mean: Shape ``(C,)``, of :func:`wide_dtype`.
        squares: Sum of squared deviations from ``mean``, shape ``(C,)``, of the same.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @property
    def var_biased(self) -> Tensor:
        """Variance divided by n, which normalises a batch in training; shape ``(C,)``."""
        return self.squares / self.count

    @property
    def var_unbiased(self) -> Tensor:
        """Variance divided by n - 1, which PyTorch stores; shape ``(C,)``; NaN if n < 2."""
        if self.count < 2:
            return torch.full_like(self.squares, math.nan)
        return self.squares / (self.count - 1)

    @property
    def is_finite(self) -> bool:
        """Whether mean and variance are finite in every channel."""
        return bool((self.mean + self.squares).isfinite().all())

    def on_host(self) -> Moments:
        """Return the moments on the CPU in float64, where parts are merged and exchanged."""
        return Moments(self.count, self.mean.cpu().double(), self.squares.cpu().double())


def values_per_channel(shape: torch.Size) -> int:
    """Return n, the number of values per channel in a batch of this shape.

    >>> values_per_channel(torch.Size([8, 3, 4, 4]))
    128
    """
    return shape[0] * math.prod(shape[2:])


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums: float64, or float32 on a device without it.

    >>> wide_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def wide(values: Tensor) -> Tensor:
    """Return values in the dtype of sums."""
    return values.to(wide_dtype(values.device))


def channel_moments(values: Tensor) -> Moments:
    """Return the moments of each channel of ``values``, shape ``(N, C, *)``.

    On a CPU the error is at most 1e-5 standard deviations of the mean and 1e-5 of the variance, up
    to 1e9 values per channel, in any memory layout and in half precision: short blocks are summed
    in float32 and merged in float64. Copies a few million values at most.

    Example:
        >>> moments = channel_moments(torch.tensor([[1.0], [5.0]]))
        >>> moments.count, moments.mean.item(), moments.var_unbiased.item()
        (2, 3.0, 8.0)
    """
    values = values.detach()
    if values.is_quantized:
        values = values.dequantize()
    if values.numel() == 0:
        zeros = torch.zeros(values.shape[1], dtype=wide_dtype(values.device), device=values.device)
        return Moments(0, zeros, zeros.clone())
    if values.device.type != "cpu" or values.numel() <= _PIECE:
        return _moments_of_piece(values)
    return merge_moments(map(_moments_of_piece, _pieces(values)))


def _pieces(values: Tensor) -> Iterator[Tensor]:
    """Split values into pieces that are small enough to copy."""
    if values.numel() <= _PIECE or values.numel() == values.shape[1]:
        yield values
        return
    # The outermost axis, along which the pieces stay in order in memory.
    axis = next(axis for axis in (0, *range(2, values.dim())) if values.shape[axis] > 1)
    share = max(1, values.shape[axis] * _PIECE // values.numel())
    for piece in values.split(share, axis):  # type: ignore[no-untyped-call]
        yield from _pieces(piece)


def _moments_of_piece(values: Tensor) -> Moments:
    if values.dtype in (torch.float16, torch.bfloat16):
        # Sums come out in the precision that they are asked for in.
        values = values.float()
    mean, var = mean_and_biased_var(values)
    is_far = mean.abs() > _MAX_MEAN_IN_STD * var.sqrt()
    if bool(is_far.any()):
        # The difference of nearby numbers is exact, so a second look from the mean is too.
        centre = mean[is_far].to(values.dtype)
        near = values[:, is_far] - centre.view(-1, *[1] * (values.dim() - 2))
        offset, var[is_far] = mean_and_biased_var(near)
        mean[is_far] = wide(centre) + offset
    count = values_per_channel(values.shape)
    return Moments(count, mean, var * count)


def mean_and_biased_var(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance in the widest dtype, the fastest way for the layout.

    As exact as :func:`channel_moments` for a mean within a few standard deviations of 0 and up to
    some million values. Never waits for the device.
    """
    if values.device.type == "cpu":
        if values.dim() == 2 or values.stride(1) == 1:
            return _of_interleaved(values.movedim(1, -1).reshape(-1, values.shape[1]))
        return _of_rows(values.flatten(2))
    if values.device.type == "cuda":
        mean, var = torch.ops.aten.batch_norm_update_stats(values, None, None, 0.0)
    else:
        dims = [0, *range(2, values.dim())]
        var, mean = torch.var_mean(values, dims, correction=0)
    return wide(mean), wide(var)


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of values of shape ``(N, C, positions)``.

    Sums along rows run at the speed of memory, several times faster than PyTorch's own batch
    normalisation. Subtracting the square of the mean in float64 is safe for a mean within a few
    standard deviations of 0; the caller reads larger ones again.
    """
    count, positions = values_per_channel(rows.shape), rows.shape[2]
    length = positions // -(-positions // _ROW_BLOCK)
    whole = positions - positions % length
    sums, squares = _sums_of_blocks(rows[:, :, :whole].unflatten(2, (-1, length)))  # type: ignore[no-untyped-call]
    if whole < positions:
        rest_sums, rest_squares = _sums_of_blocks(rows[:, :, whole:].unsqueeze(2))
        sums, squares = sums + rest_sums, squares + rest_squares
    mean = sums / count
    return mean, (squares / count - mean.square()).clamp_min(0.0)


def _sums_of_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of values and squares, ``(C,)``, of ``(N, C, blocks, positions)``."""
    norms = torch.linalg.vector_norm(blocks, dim=3)
    return wide(blocks.sum(3)).sum((0, 2)), wide(norms).square().sum((0, 2))


def _of_interleaved(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of channels-last values, shape ``(M, C)``.

    With few channels, several pixels count as one with more channels.
    """
    count, channels = pixels.shape
    if count <= _BLOCK:
        mean, var = torch.ops.aten.batch_norm_update_stats(pixels, None, None, 0.0)
        return wide(mean), wide(var)
    group = -(-_FAST_CHANNELS // channels)
    rest = count % group
    blocks = list(pixels[: count - rest].reshape(-1, group * channels).split(_BLOCK))  # type: ignore[no-untyped-call]
    if rest:
        blocks.append(pixels[count - rest :])
    found = [torch.ops.aten.batch_norm_update_stats(block, None, None, 0.0) for block in blocks]
    means, variances = (
        wide(torch.cat(each).view(-1, channels)) for each in zip(*found, strict=True)
    )
    counts = [len(block) for block in blocks for _ in range(block.shape[1] // channels)]
    weights = torch.tensor(counts, dtype=means.dtype) / count
    mean = weights @ means
    return mean, weights @ (variances + (means - mean).square())


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all samples together, the variance between the parts included.

    Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
    variances" (1979), equation 2.1.

    Raises:
        ValueError: ``parts`` is empty.

    Example:
        >>> low, high = torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])
        >>> merge_moments([channel_moments(low), channel_moments(high)]).var_biased.item()
        5.0
    """
    filled = list(parts)
    if not filled:
        raise ValueError("no moments to merge")
    merged = filled[0]
    for part in filled[1:]:
        if part.count == 0:
            continue
        count = merged.count + part.count
        delta = part.mean - merged.mean
        merged = Moments(
            count,
            merged.mean + delta * (part.count / count),
            merged.squares + part.squares + delta**2 * (merged.count * part.count / count),
        )
    return merged
