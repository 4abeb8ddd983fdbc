"""Whether the samples of a batch are more alike than those of different ones, at the input.

Of the input itself, and not of what arrives at a BN layer: there the weights, which change from
one batch to the next, would make the batches differ.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bnguard.history import InputWindow
from bnguard.moments import mean_and_biased_var
from bnguard.stats import FloatArray

# Numbers of a sample that are looked at, evenly spaced, and batches a window: enough to tell, and
# so few that the look costs next to nothing. Of the batches after the first, one in four is read.
_MAX_FEATURES = 64
_MAX_BATCHES = 64
_FIRST_BATCHES = 8
_ONE_IN = 4

# From so many batches on a slow change of the data is told from batches that differ: what a
# network that learns is fed by another one that does, as a discriminator is.
_MIN_BATCHES_OF_TREND = 16


class SampleProbe:
    """Compares the variance between batches with that between the samples of a batch.

    Reads a few numbers of each sample in the first input, without waiting for the device.
    """

    def __init__(self) -> None:
        self._newest: InputWindow | None = None
        self._moments: list[tuple[Tensor, Tensor]] = []
        self._times: list[int] = []
        self._samples = 0
        self._calls = 0

    def start_window(self) -> None:
        """Begin a new window, and keep the one that ends."""
        self._newest = self.window()
        self._moments, self._times, self._samples, self._calls = [], [], 0, 0

    def window(self) -> InputWindow | None:
        """Return the newest window with at least half of the batches of the last full one."""
        batches, newest = len(self._moments), self._newest
        if batches < 2 or (newest is not None and 2 * batches < newest.batches):
            return newest
        variances, means = (
            torch.stack(part).cpu().double().numpy() for part in zip(*self._moments, strict=True)
        )
        is_finite = np.isfinite(variances).all(0) & np.isfinite(means).all(0)
        varies = is_finite & (variances > 0.0).any(0)
        to_unbiased = self._samples / (self._samples - batches)
        within = variances[:, varies].mean(0) * to_unbiased
        between = _variance_beside_trend(means[:, varies], self._times)
        ratio = self._samples / batches * between / within
        return InputWindow(batches=batches, variance_ratio=ratio)

    def note(self, inputs: Sequence[Tensor]) -> None:
        """Take in what a batch brings to the model."""
        self._calls += 1
        if self._calls > _FIRST_BATCHES and self._calls % _ONE_IN:
            return
        if len(self._moments) >= _MAX_BATCHES:
            return
        features = _features(inputs)
        if features is None:
            return
        with torch.no_grad():
            mean, variance = mean_and_biased_var(features)
        if self._moments and self._moments[0][0].shape != mean.shape:
            self._moments, self._times, self._samples = [], [], 0
        self._moments.append((variance, mean))
        self._times.append(self._calls)
        self._samples += len(features)


def _variance_beside_trend(means: FloatArray, times: Sequence[int]) -> FloatArray:
    """Return the variance of batch means, those of many about a parabola in time, unbiased."""
    if len(means) < _MIN_BATCHES_OF_TREND:
        return np.asarray(means.var(0, ddof=1))
    powers = np.vander(np.interp(times, (times[0], times[-1]), (-1.0, 1.0)), 3)
    rest = means - powers @ np.linalg.lstsq(powers, means, rcond=None)[0]
    return np.asarray(np.square(rest).sum(0) / (len(means) - powers.shape[1]))


def _features(inputs: Sequence[Tensor]) -> Tensor | None:
    """Return some numbers of each sample, shape ``(N, F)``; None where there is no such input."""
    for values in inputs:
        if values.dim() > 1:
            if len(values) < 2 or not values.numel():
                return None
            flat = values.detach().flatten(1)
            return flat[:, :: -(-flat.shape[1] // _MAX_FEATURES)].float()
    return None
