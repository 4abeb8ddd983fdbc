"""BN404 half-precision-overflow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped, counted
from bnguard.observe.history import EvalWindow, LayerHistory
from bnguard.rules.base import Rule

# The largest finite number; bfloat16 reaches as far as float32.
_LARGEST = {"float16": 65504.0}


@dataclass(frozen=True, kw_only=True)
class HalfPrecisionOverflow(Rule):
    """Values around a layer come near the largest number that float16 can hold.

    Why it matters:
        Under float16 autocast a convolution writes float16, and beyond 65,504 it writes Inf. BN
        would scale the values back to 1, but comes too late. In eval mode, a channel whose running
        variance is too small leaves BN enlarged. One Inf makes the rest of the network NaN.

    What you see:
        The gradient scaler halves its scale again and again; validation is NaN for some samples
        under autocast, and fine in float32.

    Example:
        Autocast to float16::

            # Fault: float16 ends at 65,504
            with torch.autocast("cuda", dtype=torch.float16):
                outputs = model(batch)
            # Fix: bfloat16 reaches as far as float32
            with torch.autocast("cuda", dtype=torch.bfloat16):
                outputs = model(batch)

    Fix:
        Use bfloat16, which has three digits instead of four, or keep this part in float32. A
        convolution with outputs this large needs weight decay, or a smaller learning rate.

    What it does not mean:
        Small values that round to zero in float16 are another problem, which the gradient scaler
        solves.

    Evidence:
        Inputs in eval mode as float16: |mean| plus ``reach_std`` standard deviations, the largest
        over channels, against 65,504; and outputs, |gamma| times the largest normalised value plus
        |beta|. Batches that already contain Inf are an ``error``.

    Limits:
        max_used_share: 0.5 of the range; healthy layers use less than 1 %.
        reach_std: 4 standard deviations.

    References:
        Micikevicius et al., "Mixed Precision Training" (2018), section 3, arXiv:1710.03740.
        torch.amp, on autocast and its element types.
        NVIDIA/apex#238, overflow with convolutions and BN at any loss scale.
    """

    code: ClassVar[str] = "BN404"
    name: ClassVar[str] = "half-precision-overflow"
    explains: ClassVar[tuple[str, ...]] = ("BN401", "BN402")

    max_used_share: float = 0.5
    reach_std: float = 4.0

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Compare inputs and outputs with the range of the element type."""
        seen = layer.evaluated
        if seen is None:
            yield self.skip(layer, "the layer was not seen in eval mode")
            return
        largest = _LARGEST.get(seen.dtype)
        if largest is None:
            return
        used = self._largest_value(layer, seen) / largest
        if seen.nonfinite_batches == 0 and used <= self.max_used_share:
            return
        yield self.make_finding(
            layer,
            Severity.ERROR if seen.nonfinite_batches else Severity.WARNING,
            f"values at the layer reach {used:.0%} of the range of {seen.dtype}"
            if not seen.nonfinite_batches
            else f"{counted(seen.nonfinite_batches, 'batch', 'batches')} of {seen.dtype} inputs "
            "contained Inf",
            Evidence("share of the range", 100 * used, 100 * self.max_used_share, "%"),
            Fix("use autocast with bfloat16, or keep this part in float32"),
        )

    def _largest_value(self, layer: LayerHistory, seen: EvalWindow) -> float:
        with np.errstate(all="ignore"):
            arriving = np.abs(seen.mean) + self.reach_std * np.sqrt(seen.var_unbiased)
        gamma = 1.0 if layer.gamma is None or not layer.gamma.size else np.abs(layer.gamma).max()
        beta = 0.0 if layer.beta is None or not layer.beta.size else np.abs(layer.beta).max()
        leaving = float(gamma * seen.largest_normalised_std + beta)
        values = np.append(arriving, leaving)
        return float(np.max(values[np.isfinite(values)], initial=0.0))
