"""Whether the samples of a batch are more alike than those of different ones, at the input.

Of the input itself, and not of what arrives at a BN layer: there the weights, which change from
one batch to the next, would make the batches differ.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from bnguard.history import InputWindow
from bnguard.moments import mean_and_biased_var
from bnguard.probes.hooks import Hooks

# Numbers of a sample that are looked at, evenly spaced, and batches a window: enough to tell, and
# so few that the look costs next to nothing. Of the batches after the first, one in four is read.
_MAX_FEATURES = 64
_MAX_BATCHES = 64
_FIRST_BATCHES = 8
_ONE_IN = 4


class SampleProbe:
    """Compares the variance between batches with that between the samples of a batch.

    Reads a few numbers of each sample, without waiting for the device.

    Args:
        model: The model; the first floating-point tensor that its forward is given is read.
    """

    def __init__(self, model: nn.Module) -> None:
        self.hooks = Hooks()
        self._model = model
        self._newest: InputWindow | None = None
        self._moments: list[tuple[Tensor, Tensor]] = []
        self._samples = 0
        self._calls = 0
        self.hooks.before_outermost(model, self._note)

    def start_window(self) -> None:
        """Begin a new window, and keep the one that ends."""
        self._newest = self.window()
        self._moments, self._samples, self._calls = [], 0, 0

    def window(self) -> InputWindow | None:
        """Return the newest window with at least half of the batches of the last full one."""
        batches, newest = len(self._moments), self._newest
        if batches < 2 or (newest is not None and 2 * batches < newest.batches):
            return newest
        variances, means = (
            torch.stack(part).double().cpu().numpy() for part in zip(*self._moments, strict=True)
        )
        to_unbiased = self._samples / (self._samples - batches)
        within, between = variances.mean(0) * to_unbiased, means.var(0, ddof=1)
        varies = np.isfinite(within) & np.isfinite(between) & (within > 0.0)
        ratio = self._samples / batches * between[varies] / within[varies]
        return InputWindow(batches=batches, variance_ratio=ratio)

    def _note(self, args: tuple[object, ...]) -> None:
        if not (args and self._model.training and torch.is_grad_enabled()):
            return
        self._calls += 1
        if self._calls > _FIRST_BATCHES and self._calls % _ONE_IN:
            return
        if len(self._moments) >= _MAX_BATCHES:
            return
        features = _features(args)
        if features is None:
            return
        with torch.no_grad():
            mean, variance = mean_and_biased_var(features)
        if self._moments and self._moments[0][0].shape != mean.shape:
            self._moments, self._samples = [], 0
        self._moments.append((variance, mean))
        self._samples += len(features)


def _features(args: tuple[object, ...]) -> Tensor | None:
    """Return some numbers of each sample, shape ``(N, F)``; None where there is no such input."""
    for leaf in args if isinstance(args[0], Tensor) else tree_flatten(args)[0]:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            if len(leaf) < 2 or not leaf.numel():
                return None
            flat = leaf.detach().flatten(1)
            return flat[:, :: -(-flat.shape[1] // _MAX_FEATURES)].float()
    return None
