"""A naive record of what reaches a BN layer, to hold the probes against."""

from __future__ import annotations

import numpy as np
from torch import nn


class Oracle:
    """Records, in float64, the statistics of every batch that reaches a layer in train mode."""

    def __init__(self, layer: nn.Module) -> None:
        self.means: list[np.ndarray] = []
        self.variances: list[np.ndarray] = []
        layer.register_forward_pre_hook(self.record)

    def record(self, layer, args):
        if layer.training:
            rows = args[0].detach().double().movedim(1, 0).flatten(1).numpy()
            self.means.append(rows.mean(1))
            self.variances.append(rows.var(1, ddof=1))


def near(measured, expected, scale):
    """Within 1e-4 of the expected value, or of its natural scale where it is near zero."""
    assert np.all(np.abs(measured - expected) <= 1e-4 * np.maximum(scale, np.abs(expected)))


def check_window(window, oracle):
    """Hold a window against the record.

    What float32 buffers can tell of a variance is relative to the running variance, which is of
    the size of the largest one met or of the initial 1.
    """
    means, variances = np.array(oracle.means), np.array(oracle.variances)
    variance = np.maximum(variances.max(0), 1.0)
    near(window.mean, means.mean(0), np.sqrt(variance))
    near(window.var_unbiased, variances.mean(0), variance)
    near(window.var_max, variances.max(0), variance)
    assert np.all(window.batches == len(means))
    if len(means) > 1:
        steps = (np.diff(means, axis=0) ** 2).mean(0) / 2
        near(window.var_of_means, means.var(0, ddof=1), variance)
        near(window.var_of_means_successive, steps, variance)
