"""BN105 low-precision-statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from bnguard.findings import Evidence, Finding, Fix, Severity, Skipped
from bnguard.observe.history import LayerHistory
from bnguard.rules.base import Rule

# Distance from 1 to the next number, for the element types that buffers can have.
_ROUNDING_STEPS = {
    "float64": 2.0**-52,
    "float32": 2.0**-23,
    "float16": 2.0**-10,
    "bfloat16": 2.0**-7,
    "float8_e4m3fn": 2.0**-3,
    "float8_e5m2": 2.0**-2,
}


@dataclass(frozen=True, kw_only=True)
class LowPrecisionStatistics(Rule):
    """Running statistics are stored in so few digits that updates round to nothing.

    Why it matters:
        An update adds ``momentum`` times a difference. bfloat16 has three digits: at momentum 0.1,
        a difference below 4 % of the value rounds to nothing, so the average stops moving. In
        float16 a variance above 65,504 becomes infinite.

    What you see:
        Training is fine. Validation stops improving early, or becomes NaN, after ``model.half()``
        or ``model.bfloat16()``.

    Example:
        A model cast as a whole::

            # Fault: the running statistics are cast too
            model.bfloat16()
            # Fix: autocast leaves BN in float32
            model.float()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                outputs = model(batch)

    Fix:
        Keep the BN layers in float32, and use autocast for the rest. PyTorch's kernels take
        half-precision inputs with float32 BN parameters on CUDA and under autocast.

    What it does not mean:
        Inference in half precision is fine: in eval mode, and in a checkpoint, nothing is added any
        more (``info``).

    Evidence:
        The relative rounding step of the element type of the buffers.

    Limits:
        max_rounding_step: 1e-4. float32 has 1.2e-7, float16 1e-3, bfloat16 8e-3.

    References:
        Micikevicius et al., "Mixed Precision Training" (2018), section 3.3, arXiv:1710.03740.
        NVIDIA/apex#144, which keeps BN in single precision for the accuracy of its statistics.
    """

    code: ClassVar[str] = "BN105"
    name: ClassVar[str] = "low-precision-statistics"
    is_static: ClassVar[bool] = True
    explains: ClassVar[tuple[str, ...]] = ("BN301", "BN302")
    acts_by_statistics: ClassVar[bool] = True

    max_rounding_step: float = 1e-4

    def check(self, layer: LayerHistory) -> Iterator[Finding | Skipped]:
        """Look up the rounding step of the buffers."""
        if layer.running is None:
            return
        step = _ROUNDING_STEPS.get(layer.statistics_dtype or "")
        if step is None:
            yield self.skip(layer, "the element type of the buffers is unknown")
            return
        if step <= self.max_rounding_step:
            return
        yield self.make_finding(
            layer,
            Severity.WARNING if layer.training or layer.updates_seen else Severity.INFO,
            f"the running statistics are {layer.statistics_dtype}: small updates round to nothing",
            Evidence("rounding step", step, self.max_rounding_step),
            Fix("call .float() on the BN layers, and use autocast for the rest"),
        )
