"""Statistics of the batch statistics over a window of steps, kept on the device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bnguard.layers.distances import FloatArray
from bnguard.observe.history import BatchWindow


class Window:
    """Accumulates batch means and variances, a row of C channels, without waiting for the device.

    Several batches are merged at once, as Chan, Golub and LeVeque do ("Updating formulae and a
    pairwise algorithm for computing sample variances", 1979, equation 2.1), so that a large mean
    hides no small deviation. Holds 7 vectors of C values.

    Args:
        like: A tensor of shape ``(C,)`` with the dtype and device to keep.
    """

    def __init__(self, like: Tensor) -> None:
        self._batches = torch.zeros_like(like)
        self._centre = torch.zeros(2, like.numel(), dtype=like.dtype, device=like.device)
        self._squares_of_means = torch.zeros_like(like)
        self._squares_of_steps = torch.zeros_like(like)
        self._latest_mean = torch.full_like(like, math.nan)
        self._var_max = torch.full_like(like, -math.inf)

    def add(self, batches: Tensor) -> None:
        """Add the means and unbiased variances of K batches, shape ``(K, 2, C)``, in their order.

        A channel in which either is not finite has not seen that batch. Writes to ``batches``.
        """
        total = batches[:, 0] + batches[:, 1]
        is_finite = total.sub_(total)  # 0, or NaN where either is not finite
        batches += is_finite.unsqueeze(1)
        means, variances = batches.unbind(1)
        seen = is_finite == 0
        weight = is_finite.eq_(0)
        count = weight.sum(0)
        before, self._batches = self._batches, self._batches + count
        share = count / self._batches.clamp_min(1.0)

        offset = (batches - self._centre).nan_to_num_(nan=0.0)
        mean_offset = offset.sum(0) / count.clamp_min_(1.0)
        within = (offset[:, 0] - mean_offset[0]).mul_(weight).square_().sum(0)
        between = (before * share).mul_(mean_offset[0].square())
        self._squares_of_means += within.add_(between)
        self._centre += mean_offset * share

        latest = [self._latest_mean]
        for mean, is_seen in zip(means, seen, strict=True):
            latest.append(torch.where(is_seen, mean, latest[-1]))
        self._latest_mean = latest[-1]
        steps = torch.stack(latest).diff(dim=0).nan_to_num_(nan=0.0)
        self._squares_of_steps += steps.square_().sum(0)

        self._var_max = torch.maximum(self._var_max, variances.nan_to_num(nan=-math.inf).amax(0))

    def rows(self) -> Tensor:
        """Return everything that was accumulated, a row each, for :meth:`reading`."""
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
        """Return the window of some of the channels, from their columns of :meth:`rows`.

        Args:
            rows: The columns.
            weight_square: Sum of the squared weights of the batches that one batch here blends,
                1 where it blends none: the means of blends vary less, by this factor.
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
