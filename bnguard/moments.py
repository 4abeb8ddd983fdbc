"""Moments of what arrives at a layer, computed where the tensors are; knows no module and no hook.

Every tensor that is normalised has shape ``(N, C, *)``: samples, channels, positions. PyTorch's
conventions hold throughout: ``momentum`` is the weight of the *new* value, a batch is normalised
with its biased variance (divided by n), and ``running_var`` stores the unbiased one (n - 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Beyond this, sums in float32 cost the variance more than 1e-4 of itself.
_MAX_MEAN_IN_STD = 30.0
# Kinds of devices that do not compute in float64: Apple's.
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
        """Variance divided by n - 1, which PyTorch stores; shape ``(C,)``; NaN where n < 2."""
        if self.count < 2:
            return torch.full_like(self.squares, math.nan)
        return self.squares / (self.count - 1)


def values_per_channel(shape: torch.Size) -> int:
    """Return n, the number of values that a batch of this shape has per channel.

    >>> values_per_channel(torch.Size([8, 3, 4, 4]))
    128
    """
    return shape[0] * math.prod(shape[2:])


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that sums are kept in: float64, or float32 on a device without it.

    >>> wide_dtype(torch.device("cpu"))
    torch.float64
    """
    return torch.float32 if device.type in _WITHOUT_FLOAT64 else torch.float64


def wide(values: Tensor) -> Tensor:
    """Return values in the dtype that sums are kept in."""
    return values.to(wide_dtype(values.device))


def channel_moments(values: Tensor) -> Moments:
    """Return the moments of each channel of ``values``, shape ``(N, C, *)``.

    Half-precision values are widened to float32 first, since sums come out in the precision that
    they are asked for in.

    Example:
        >>> moments = channel_moments(torch.tensor([[1.0], [5.0]]))
        >>> moments.count, moments.mean.item(), moments.var_unbiased.item()
        (2, 3.0, 8.0)
    """
    count = values_per_channel(values.shape)
    channels = values.shape[1]
    if count == 0:
        zeros = torch.zeros(channels, dtype=wide_dtype(values.device), device=values.device)
        return Moments(0, zeros, zeros.clone())
    values = values.detach()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    mean, var = mean_and_biased_var(values)
    is_far = mean.abs() > _MAX_MEAN_IN_STD * var.sqrt()
    if bool(is_far.any()):
        # The difference of nearby numbers is exact, so a second look from the mean is too.
        centre = mean[is_far].to(values.dtype)
        near = values[:, is_far] - centre.view(-1, *[1] * (values.dim() - 2))
        offset, var[is_far] = mean_and_biased_var(near)
        mean[is_far] = wide(centre) + offset
    return Moments(count, mean, var * count)


def mean_and_biased_var(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance, in the widest dtype, by the fastest way for the layout."""
    if values.device.type == "cpu" and values.dim() > 2 and values.is_contiguous():
        return _mean_and_var_of_rows(values.flatten(2))
    if values.device.type in ("cpu", "cuda"):
        mean, var = torch.ops.aten.batch_norm_update_stats(values, None, None, 0.0)
    else:
        dims = [0, *range(2, values.dim())]
        var, mean = torch.var_mean(values, dims, correction=0)
    return wide(mean), wide(var)


def _mean_and_var_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same for contiguous values of shape ``(N, C, positions)``.

    Sums along rows run at the speed of memory, several times that of the kernel of PyTorch's own
    batch normalisation. The mean's square is taken off in float64, which is safe while the mean
    is no more than some standard deviations: what is further off is looked at again.
    """
    count = values_per_channel(rows.shape)
    mean = wide(rows.sum(2)).sum(0) / count
    mean_square = wide(torch.linalg.vector_norm(rows, dim=2)).square().sum(0) / count
    return mean, (mean_square - mean.square()).clamp_min(0.0)


def merge_moments(parts: Iterable[Moments]) -> Moments:
    """Return the moments of all samples together, weighted by their counts.

    The variance between the means of the parts is part of the variance of the whole: Chan, Golub
    and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
    (1979), equation 2.1.

    Raises:
        ValueError: There are no parts.

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
