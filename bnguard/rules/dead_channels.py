"""BN204 dead-channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.history import LayerHistory
from bnguard.rules.base import Rule
from bnguard.stats import FloatArray


@dataclass(frozen=True, kw_only=True)
class DeadChannels(Rule):
    """Channels without any variance reach the layer: their output is beta, whatever the input.

    Why it matters:
        A constant channel minus its mean is zero. It carries nothing forward and gets no gradient
        back: dead ReLUs before BN, a convolution that decayed to zero, an input that is constant.
        With a variance of zero the layer multiplies by 1/sqrt(eps), some 300, as soon as a value
        differs (BN403).

    Evidence:
        The share of channels whose variance was at most ``max_var_in_eps`` in every batch of the
        window; without batches, whose running variance is. A few dead channels are common in
        healthy networks: ``info``.

    Limits:
        max_var_in_eps: 0.1 of eps, of 1e-5 where eps is larger: 1e-6 as a rule. Below it eps alone
            sets the scale; above it an eps that was chosen large only damps what does vary.
        max_dead_share: 0.5 of a layer's channels, beyond which it is a ``warning``; dead ReLUs
            before a layer make it 1, healthy networks of the zoo have at most a few channels.

    Fix:
        Put BN before the activation, or use one that does not die::

            torch.nn.Sequential(conv, torch.nn.BatchNorm2d(channels), torch.nn.LeakyReLU())

        and look at the learning rate and at what the layer before receives.

    Fix safety:
        A changed activation means training again. Dead channels can be pruned without a loss.

    References:
        Lu et al., "Dying ReLU and Initialization: Theory and Numerical Examples" (2019).
        Ioffe & Szegedy, "Batch Normalization" (2015), section 3.2: BN before the nonlinearity.
    """

    code: ClassVar[str] = "BN204"
    name: ClassVar[str] = "dead-channels"
    is_static: ClassVar[bool] = True

    max_var_in_eps: float = 0.1
    max_dead_share: float = 0.5

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Count the channels without variance in all batches, or without running variance."""
        var, is_dead = _var(layer), self.dead(layer)
        if var is None or is_dead is None:
            yield self._skipped(layer, "no variance is known")
            return
        if not is_dead.any():
            return
        share = float(is_dead.mean())
        yield self._finding(
            layer,
            Severity.WARNING if share > self.max_dead_share else Severity.INFO,
            f"{is_dead.sum()} of {is_dead.size} channels vary by next to nothing, a variance of "
            f"{np.abs(var[is_dead]).max():.2g} at most: their output is as good as constant",
            Evidence("dead channels", 100 * share, 100 * self.max_dead_share, "%"),
            _fix(layer),
            channels=tuple(map(int, np.flatnonzero(is_dead))),
        )

    def dead(self, layer: LayerHistory) -> npt.NDArray[np.bool_] | None:
        """Return which channels hardly vary, shape ``(C,)``; None where no variance is known."""
        var = _var(layer)
        if var is None:
            return None
        least = self.max_var_in_eps * min(layer.eps, _USUAL_EPS)
        return np.isfinite(var) & (np.abs(var) <= least)


def _var(layer: LayerHistory) -> FloatArray | None:
    """Return the largest variance of each channel that was seen; None where none is finite."""
    if layer.window is not None:
        var = layer.window.var_max
    elif layer.running is not None:
        var = layer.running.var
    else:
        return None
    return var if np.isfinite(var).any() else None


# PyTorch's default. A larger eps is no sign that channels are dead.
_USUAL_EPS = 1e-5


def _fix(layer: LayerHistory) -> Fix:
    if layer.position == 0:
        return Fix(
            "look for channels of the data that are constant, or of so small a scale that they "
            "want standardising; then at what stands before the layer"
        )
    return Fix("BN before the activation; look at learning rate and input of the layer before")
