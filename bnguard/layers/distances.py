"""Functions of per-channel statistics on the host, float64 arrays of shape ``(C,)``; no torch.

PyTorch's conventions: ``momentum`` is the weight of the *new* value, a batch is normalised with its
biased variance (divided by n), and ``running_var`` stores the unbiased one (divided by n - 1).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

# PyTorch's default; a state dict does not store the momentum.
DEFAULT_MOMENTUM = 0.1

# Weight at which the initial statistics count as forgotten; the default of BN303.
FORGOTTEN_WEIGHT = 0.05


def shift_std(
    mean: FloatArray, running_mean: FloatArray, running_var: FloatArray, eps: float
) -> FloatArray:
    """Return (mean - running_mean) / sqrt(running_var + eps), in running standard deviations.

    >>> shift_std(np.array([3.0]), np.array([1.0]), np.array([4.0]), 0.0).item()
    1.0
    """
    return np.asarray((mean - running_mean) / np.sqrt(running_var + eps))


def log_variance_ratio(var: FloatArray, running_var: FloatArray, eps: float) -> FloatArray:
    """Return log((var + eps) / (running_var + eps)), natural logarithm.

    >>> log_variance_ratio(np.array([1.0]), np.array([1.0]), 1e-5).item()
    0.0
    """
    return np.asarray(np.log((var + eps) / (running_var + eps)))


def largest(values: FloatArray | None) -> float | None:
    """Return the largest absolute finite value; None without one.

    >>> largest(np.array([0.5, -2.0, np.nan]))
    2.0
    """
    if values is None or not np.isfinite(values).any():
        return None
    return float(np.max(np.abs(values[np.isfinite(values)])))


def initial_weight(momentum: float | None, updates: int) -> float:
    """Return the weight that the initial statistics (0, 1) still have after ``updates`` updates.

    (1 - momentum)^updates; the cumulative average of ``momentum=None`` forgets at once.

    >>> round(initial_weight(0.1, 28), 3), initial_weight(None, 1)
    (0.052, 0.0)
    """
    if momentum is None:
        return 1.0 if updates == 0 else 0.0
    if not 0.0 <= momentum <= 1.0:
        # Not an average: the initial values grow or oscillate.
        return 1.0
    return float((1.0 - momentum) ** updates)


def without_initial(
    mean: FloatArray, var: FloatArray, weight: float
) -> tuple[FloatArray, FloatArray]:
    """Return running mean and variance without the ``weight`` of the initial (0, 1) in them.

    >>> mean, var = without_initial(np.array([0.9]), np.array([1.9]), 0.1)
    >>> mean.round(2), var.round(2)
    (array([1.]), array([2.]))
    """
    rest = max(1.0 - weight, np.finfo(np.float64).tiny)
    with np.errstate(all="ignore"):
        return np.asarray(mean / rest), np.asarray(np.maximum(var - weight, 0.0) / rest)


def initial_shift_std(
    mean: FloatArray, var: FloatArray, eps: float, weight_now: float, weight_then: float
) -> FloatArray:
    """Return how far the initial mean 0 shifts a running mean, in running standard deviations.

    Given running statistics in which the initial (0, 1) have ``weight_now``, and the same batches:
    w |batch mean| / sqrt((1 - w) batch variance + w + eps) at w = ``weight_then``.

    >>> initial_shift_std(np.array([900.0]), np.array([1.0]), 0.0, 0.1, 0.01).round(2)
    array([10.])
    """
    batch_mean, batch_var = without_initial(mean, var, weight_now)
    with np.errstate(all="ignore"):
        then = (1.0 - weight_then) * batch_var + weight_then
        return np.asarray(weight_then * np.abs(batch_mean) / np.sqrt(then + eps))


def updates_to_forget(momentum: float | None, max_initial_weight: float) -> float:
    """Return the updates after which the initial statistics have at most this weight.

    Infinite for momentum 0.

    >>> updates_to_forget(0.1, 0.05), updates_to_forget(None, 0.05), updates_to_forget(0.0, 0.05)
    (29, 1, inf)
    """
    if momentum is None or momentum >= 1.0:
        return 1
    if not momentum > 0.0:
        return math.inf
    return math.ceil(math.log(max_initial_weight) / math.log1p(-momentum))
