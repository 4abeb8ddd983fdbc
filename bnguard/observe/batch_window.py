"""Sums of the batch statistics of many layers over a window of steps."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bnguard.layers.distances import FloatArray
from bnguard.observe.history import BatchWindow


class Window:
    """Accumulates batch means and variances, a row of C channels, without waiting for the device.

    Merges several batches at once by Chan, Golub and LeVeque ("Updating formulae and a pairwise
    algorithm for computing sample variances", 1979, equation 2.1), which is exact for large means.
    Holds 7 vectors of C values.

    Args:
        like: A tensor of shape ``(C,)`` with the dtype and device to use.
    """

    def __init__(self, like: Tensor) -> None:
        self._batches = torch.zeros_like(like)
        self._centre = torch.zeros(2, like.numel(), dtype=like.dtype, device=like.device)
        self._squares_of_means = torch.zeros_like(like)
        self._squares_of_steps = torch.zeros_like(like)
        self._latest_mean = torch.full_like(like, math.nan)
        self._var_max = torch.full_like(like, -math.inf)

    def add(self, batches: Tensor, *, is_finite: bool) -> None:
        """Add the means and unbiased variances of K batches, shape ``(K, 2, C)``, in order.

        Channels in which either is not finite skip the batch. Writes to ``batches``.

        Args:
            batches: The statistics.
            is_finite: Whether all are known to be finite, which saves half the work.
        """
        count = torch.full_like(self._batches[0], len(batches))
        seen = None
        if not is_finite:
            total = batches[:, 0] + batches[:, 1]
            seen = total.sub_(total) == 0.0
            batches = torch.where(seen.unsqueeze(1), batches, self._centre)
            count = seen.sum(0).to(batches.dtype)
        before, self._batches = self._batches, self._batches + count
        share = count / self._batches.clamp_min(1.0)

        offset = batches.sub_(self._centre)
        means, variances = offset.unbind(1)
        highest = variances.amax(0).add_(self._centre[1])
        self._var_max = torch.maximum(self._var_max, highest)

        latest = self._latest_mean - self._centre[0]
        steps = torch.empty_like(means)
        if seen is None:
            torch.sub(means[1:], means[:-1], out=steps[1:])
            torch.sub(means[0], latest, out=steps[0])
            latest = means[-1]
        else:
            for step, mean, is_seen in zip(steps, means, seen, strict=True):
                mean = torch.where(is_seen, mean, latest)
                torch.sub(mean, latest, out=step)
                latest = mean
        (steps[0] if seen is None else steps).nan_to_num_(nan=0.0)
        self._squares_of_steps += steps.square_().sum(0)
        self._latest_mean = latest + self._centre[0]

        mean_offset = offset.sum(0) / count.clamp_min(1.0)
        within = torch.sub(means, mean_offset[0], out=steps)
        if seen is not None:
            within *= seen
        between = (before * share).mul_(mean_offset[0].square())
        self._squares_of_means += within.square_().sum(0).add_(between)
        self._centre += mean_offset * share

    def skip(self) -> None:
        """Do not compare the next batch with the newest: others came between."""
        self._latest_mean = torch.full_like(self._latest_mean, math.nan)

    def rows(self) -> Tensor:
        """Return the accumulated vectors, a row each, for :meth:`reading`."""
        return torch.stack(
            [
                self._batches,
                *self._centre,
                self._squares_of_means,
                self._squares_of_steps,
                self._var_max,
            ]
        )

    def reading(self, rows: FloatArray, weight_square: float) -> BatchWindow | None:
        """Return the window of some channels from their columns of :meth:`rows`; None without one.

        Args:
            rows: The columns.
            weight_square: Sum of the squared weights of the batches blended in one batch here, 1
                without blending: the factor by which the means of blends vary less.
        """
        batches, mean, var, squares_of_means, squares_of_steps, var_max = rows
        if not batches.any():
            return None
        pairs = np.where(batches > 1, batches - 1, np.nan) * weight_square
        return BatchWindow(
            batches=batches,
            mean=mean,
            var_unbiased=np.maximum(var, 0.0),
            var_of_means=squares_of_means / pairs,
            var_of_means_successive=squares_of_steps / (2 * pairs),
            var_max=np.maximum(var_max, 0.0),
        )
