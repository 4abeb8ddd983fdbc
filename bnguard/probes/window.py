"""Statistics of the batch statistics over a window of steps, kept on the device."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bnguard.history import BatchWindow
from bnguard.stats import FloatArray


class Window:
    """Accumulates batch means and variances, a row of C channels, without waiting for the device.

    Means are updated as Welford does ("Note on a method for calculating corrected sums of squares
    and products", 1962), so that a large mean hides no small deviation.

    Args:
        like: A tensor of shape ``(C,)`` with the dtype and device to keep.
        first_step: Number of the first step that can be in the window.
    """

    def __init__(self, like: Tensor, first_step: int) -> None:
        self._first_step = first_step
        self._batches = torch.zeros_like(like)
        self._centre = torch.zeros(2, like.numel(), dtype=like.dtype, device=like.device)
        self._squares_of_means = torch.zeros_like(like)
        self._squares_of_steps = torch.zeros_like(like)
        self._previous_mean = torch.full_like(like, math.nan)
        self._var_min = torch.full_like(like, math.inf)
        self._var_max = torch.full_like(like, -math.inf)

    def add(self, batch: Tensor, weight_square: Tensor) -> None:
        """Add the mean and unbiased variance of a batch; channels where they are not finite stay.

        Args:
            batch: Shape ``(2, C)``.
            weight_square: Sum of the squared weights of the batches that ``batch`` blends, shape
                ``(C,)``: 1 for one batch. A blend varies less, by this factor, than a batch.
        """
        seen = torch.isfinite(batch).all(0)
        mean, var = batch = torch.where(seen, batch, self._centre)
        self._batches += seen
        delta = batch - self._centre
        self._centre += delta / self._batches.clamp_min(1.0)
        scale = torch.where(seen, 1.0 / weight_square, 0.0)
        self._squares_of_means += scale * delta[0] * (mean - self._centre[0])
        step = (mean - self._previous_mean).nan_to_num_(nan=0.0)
        self._squares_of_steps += scale * step.square_()
        torch.where(seen, mean, self._previous_mean, out=self._previous_mean)
        self._var_min = torch.where(seen, torch.minimum(self._var_min, var), self._var_min)
        self._var_max = torch.where(seen, torch.maximum(self._var_max, var), self._var_max)

    def rows(self) -> Tensor:
        """Return everything that was accumulated, a row each, for :meth:`reading`."""
        return torch.stack(
            [
                self._batches,
                *self._centre,
                self._squares_of_means,
                self._squares_of_steps,
                self._var_min,
                self._var_max,
            ]
        )

    def reading(self, rows: FloatArray, last_step: int) -> BatchWindow | None:
        """Return the window of some of the channels, from their columns of :meth:`rows`."""
        batches, mean, var, squares_of_means, squares_of_steps, var_min, var_max = rows
        if not batches.any():
            return None
        pairs = np.where(batches > 1, batches - 1, np.nan)
        return BatchWindow(
            batches=batches,
            mean=mean,
            var_unbiased=np.maximum(var, 0.0),
            var_of_means=squares_of_means / pairs,
            var_of_means_successive=squares_of_steps / (2 * pairs),
            var_min=np.maximum(var_min, 0.0),
            var_max=np.maximum(var_max, 0.0),
            first_step=self._first_step,
            last_step=last_step,
        )
