"""BN403 amplifying-channel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import History, LayerHistory
from bnguard.rules.base import ModelRule
from bnguard.rules.measurements import (
    distance_of,
    evaluated_too_early,
    is_known_harmless,
    is_lasting,
)


@dataclass(frozen=True, kw_only=True)
class AmplifyingChannel(ModelRule):
    """Eval mode multiplies a channel so much that it drowns the others, or overflows.

    Why it matters:
        In eval mode a channel is multiplied by gamma / sqrt(running variance + eps). If its
        variance in training was near zero, that is hundreds: a value that differs a little drowns
        all other channels, or overflows in float16. In training the batch bounds the result: no
        normalised value exceeds sqrt(n - 1).

    What you see:
        Evaluation is fine on most samples and absurd on a few, or becomes Inf; training is fine.

    Example:
        A channel that was constant in training::

            # Fault: 1 / sqrt(0 + 1e-5) = 316
            layer.running_var[channel] = 0.0
            # Fix: statistics of data that vary as in evaluation
            bnguard.recalibrate(model, train_loader)
            # or take out a channel that is dead in training
            layer.weight.data[channel] = 0.0

    Fix:
        Recalibrate, which is measured and can be undone, or remove the channel. A channel that is
        dead in training (BN204) can be removed without a loss.

    What it does not mean:
        A large gain alone is not a fault: a channel of small scale that a gamma enlarges is fine,
        as with a gain of 1,902 in a published MobileNetV2. Before a bounded activation such as
        ReLU6 no channel can drown others. It is ``info`` if the mode gap shows no harm, and, where
        the whole layer drifted, until harm lasts as in BN301, which is then its cause.

    Evidence:
        The largest |value - running mean| of the newest evaluation, in running standard deviations.
        If it is within its limit, or there was none, as in a checkpoint: the gain. A negative
        running variance whose root is not a number is an ``error``. A state dict does not hold eps:
        a finding that holds with PyTorch's 1e-5 and with TensorFlow's 1e-3 is a ``warning``, one
        that holds with 1e-5 alone is ``info``.

    Limits:
        max_normalised_std: 100 running standard deviations. 95 % of the healthy runs of the zoo
            stay below 9; BN on raw pixels, some of which are nearly always black, reaches 280
            (``info`` without a mode gap). A channel that wakes in evaluation reaches 190 to 250.
        max_gain: 1,000. With eps 1e-5, 316 times gamma is the largest possible gain. It counts for
            channels that were almost constant in training, with outputs that varied by at most 0.3,
            as in BN204. Dead channels of published networks reach 370 (MobileNetV2, eps 1e-5) and
            75 (EfficientNet-Lite0, eps 1e-3).
        max_initial_weight: 0.05, as in BN301, for the values of an evaluation.

    References:
        Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization" (2020),
            on training against inference, arXiv:1906.03548.
        Ioffe & Szegedy, "Batch Normalization" (2015), algorithm 2, arXiv:1502.03167.
        patrick-kidger/equinox#955, values of 10^9 from a variance of 0.
    """

    code: ClassVar[str] = "BN403"
    name: ClassVar[str] = "amplifying-channel"
    is_static: ClassVar[bool] = True
    explains: ClassVar[tuple[str, ...]] = ("BN302",)

    max_normalised_std: float = 100.0
    max_gain: float = 1000.0
    max_initial_weight: float = 0.05

    def check_model(self, history: History) -> Iterator[Finding | Skipped]:
        """Compare the normalised values, and the gain, of each layer with their limits."""
        too_early = evaluated_too_early(history, self.max_initial_weight)
        for layer in history.layers:
            yield from self._judge(layer, too_early.get(layer.name))

    def _judge(self, layer: LayerHistory, too_early: str | None) -> Iterator[Finding | Skipped]:
        if layer.running is None or not layer.running.var.size:
            yield self.skip(layer, "the layer keeps no running statistics")
            return
        least, most = layer.possible_eps[0], layer.possible_eps[-1]
        negative = tuple(map(int, np.flatnonzero(layer.running.var + least < 0.0)))
        if negative:
            is_certain = bool((layer.running.var + most < 0.0).any())
            yield self.make_finding(
                layer,
                Severity.ERROR if is_certain else Severity.INFO,
                "a running variance is negative, so its root and every evaluation are NaN"
                + ("" if is_certain else f" if eps is {least:g}; eps is not stored"),
                Evidence(
                    "smallest variance", float(np.nanmin(layer.running.var)), 0.0, is_minimum=True
                ),
                _FIX,
                channels=negative,
            )
            return
        seen = layer.evaluated
        if too_early is not None:
            yield self.skip(layer, too_early)
        elif seen is not None and seen.largest_normalised_std > self.max_normalised_std:
            yield self.make_finding(
                layer,
                Severity.INFO if _is_harmless(layer) or _may_pass(layer) else Severity.WARNING,
                "in eval mode a value is so far from the running mean that "
                + (
                    "it drowns the other channels"
                    if layer.bounded_by is None
                    else f"the {layer.bounded_by} after it saturates"
                ),
                Evidence(
                    "largest normalised value",
                    seen.largest_normalised_std,
                    self.max_normalised_std,
                    "σ",
                ),
                _FIX,
                step=seen.step,
            )
            return
        yield from self._judge_gain(layer)

    def _judge_gain(self, layer: LayerHistory) -> Iterator[Finding]:
        """Compare the gain with its limit; if eps is unknown, with each usual eps."""
        gains = {eps: _gain(layer, eps) for eps in layer.possible_eps}
        largest = {eps: float(np.max(gain, initial=0.0)) for eps, gain in gains.items()}
        # The larger eps is, the smaller the gain.
        sure, likely = largest[layer.possible_eps[-1]], largest[layer.possible_eps[0]]
        if likely <= self.max_gain:
            return
        is_certain = sure > self.max_gain
        each = " and ".join(f"{gain:,.4g} with eps {eps:g}" for eps, gain in largest.items())
        yield self.make_finding(
            layer,
            Severity.WARNING if is_certain else Severity.INFO,
            "eval mode multiplies a channel so much that a small difference drowns all others"
            + ("" if layer.is_eps_known else f"; eps is not stored, the gain is {each}"),
            Evidence("largest gain", sure if is_certain else likely, self.max_gain),
            _FIX,
            channels=tuple(map(int, np.flatnonzero(gains[layer.possible_eps[0]] > self.max_gain))),
        )


_FIX = Fix("recalibrate, or remove the channel if it is dead in training", "recalibrate")

# Outputs that vary by less in training are almost constant: BN204's limit.
_CONSTANT_STD = 0.3


def _gain(layer: LayerHistory, eps: float) -> np.ndarray:
    """Return |gamma| / sqrt(running variance + eps) per channel; 0 if not finite."""
    assert layer.running is not None
    if layer.gamma is not None and layer.gamma.shape != layer.running.var.shape:
        return np.empty(0)
    with np.errstate(all="ignore"):
        gain = np.abs(1.0 if layer.gamma is None else layer.gamma) / np.sqrt(
            layer.running.var + eps
        )
    return np.where(np.isfinite(gain) & _can_drown(layer), gain, 0.0)


def _is_harmless(layer: LayerHistory) -> bool:
    """Return whether the modes agree or, if that is unknown, an activation bounds the value."""
    is_bounded = layer.run.mode_gap is None and layer.bounded_by is not None
    return is_bounded or is_known_harmless(layer.run)


def _may_pass(layer: LayerHistory) -> bool:
    """Return whether the whole layer drifted, which moving weights cause for a while (BN301)."""
    distance = distance_of(layer)
    return distance is not None and distance.is_beyond and not is_lasting(layer.run)


def _can_drown(layer: LayerHistory) -> np.ndarray:
    """Return which channels can drown others: almost constant, no bounded activation after BN."""
    assert layer.running is not None
    output_std = layer.output_std
    if layer.bounded_by is not None or output_std is None:
        return np.zeros(layer.running.var.shape, dtype=np.bool_)
    return ~(output_std > _CONSTANT_STD)
