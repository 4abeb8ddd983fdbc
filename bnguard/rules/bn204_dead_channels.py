"""BN204 dead-channels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.layers.distances import FloatArray
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule


@dataclass(frozen=True, kw_only=True)
class DeadChannels(Rule):
    """Channels without variance reach the layer, so their output is beta for every input.

    Why it matters:
        A constant channel minus its mean is zero: it carries nothing forward and gets no gradient
        back. Dead ReLUs before BN, a convolution that decayed to zero, or a constant input do this.
        With variance 0, BN multiplies by 1/sqrt(eps), some 300, once a value differs (BN403).

    What you see:
        A network that learns less than its size suggests, often after a learning rate that was too
        high in the first steps. If all channels are dead, the output does not depend on the input.

    Example:
        An activation before BN::

            # Fault: a dead ReLU gives BN a constant
            block = torch.nn.Sequential(conv, torch.nn.ReLU(), torch.nn.BatchNorm2d(channels))
            # Fix: BN first, or an activation that does not die
            block = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(channels), torch.nn.ReLU())

    Fix:
        Put BN before the activation, and check the learning rate and the input of the layer before.
        A changed activation needs training again. Dead channels can be pruned without a loss.

    What it does not mean:
        Some dead channels are normal, in depthwise layers above all, where weight decay removes
        what is not needed: ``info``. A large eps, or a small input that a large gamma enlarges, is
        not a dead channel.

    Evidence:
        The share of channels whose variance was at most ``max_var_in_eps`` in every batch of the
        window (without batches, whose running variance is), and whose gamma does not make up for
        it.

    Limits:
        max_var_in_eps: 0.1 of eps, at most of 1e-5, so 1e-6 as a rule. Below it eps alone sets the
            scale.
        max_output_std: 0.3, the standard deviation of the outputs up to which a channel is dead. A
            published MobileNetV2 has three channels with variances of 5e-8 to 2e-7 and gammas of 3
            to 6, whose outputs vary by 0.4 to 0.8.
        max_dead_share: 0.75 of the channels, beyond which it is a ``warning``. Dead ReLUs before a
            layer and constant inputs make it 1. A published MobileNetV2 reaches 0.44, an
            EfficientNet-Lite0 0.125, three others have none; small depthwise networks reach 0.64
            with weight decay 0.02 on gamma too, at 99 % accuracy.

    References:
        Lu et al., "Dying ReLU and Initialization" (2019), arXiv:1903.06733.
        Ioffe & Szegedy, "Batch Normalization" (2015), section 3.2, arXiv:1502.03167.
        pytorch/pytorch#5410, what BN makes of constant channels.
    """

    code: ClassVar[str] = "BN204"
    name: ClassVar[str] = "dead-channels"
    is_static: ClassVar[bool] = True

    max_var_in_eps: float = 0.1
    max_output_std: float = 0.3
    max_dead_share: float = 0.75

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Count the channels without variance in all batches, or without running variance."""
        var, is_dead = _var(layer), self.dead(layer)
        if var is None or is_dead is None:
            yield self.skip(layer, "the variance is unknown")
            return
        if not is_dead.any():
            return
        share = float(is_dead.mean())
        yield self.make_finding(
            layer,
            Severity.WARNING if share > self.max_dead_share else Severity.INFO,
            f"the outputs of {is_dead.sum()} of {is_dead.size} channels are almost constant: their "
            f"inputs have a variance of at most {np.abs(var[is_dead]).max():.2g}",
            Evidence("dead channels", 100 * share, 100 * self.max_dead_share, "%"),
            _fix(layer),
            channels=tuple(map(int, np.flatnonzero(is_dead))),
        )

    def dead(self, layer: LayerHistory) -> npt.NDArray[np.bool_] | None:
        """Return which channels hardly vary, shape ``(C,)``; None if no variance is known."""
        var, output_std = _var(layer), layer.output_std
        if var is None or output_std is None:
            return None
        least = self.max_var_in_eps * min(layer.eps, _USUAL_EPS)
        # A gamma that is not finite does not compensate.
        is_damped = ~(output_std > self.max_output_std)
        return np.isfinite(var) & (np.abs(var) <= least) & is_damped


def _var(layer: LayerHistory) -> FloatArray | None:
    """Return the largest variance observed in each channel; None if none is finite."""
    if layer.window is not None:
        var = layer.window.var_max
    elif layer.running is not None:
        var = layer.running.var
    else:
        return None
    return var if np.isfinite(var).any() else None


# PyTorch's default. A larger eps does not mean that channels are dead.
_USUAL_EPS = 1e-5


def _fix(layer: LayerHistory) -> Fix:
    if layer.position == 0:
        return Fix(
            "check the data for channels that are constant or need standardising, then what comes "
            "before the layer"
        )
    if layer.fed_by is None:
        return Fix(
            "check weights, input and learning rate of the layer before; if an activation feeds "
            "BN, put BN before it"
        )
    if layer.fed_by.startswith(("Conv", "Linear", "Lazy")):
        return Fix(
            f"check the weights of the {layer.fed_by} before, which may have decayed to zero, and "
            "its input; dead channels can be pruned without a loss"
        )
    return Fix("put BN before the activation; check learning rate and input of the layer before")
