"""What is to be calibrated, on what, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments
from bnguard.process_group import Ranks
from bnguard.recalibration.batches import Batch, Forward, call
from bnguard.recalibration.progress import Progress

OnNonfinite = Literal["skip", "error"]


@dataclass(frozen=True, eq=False)
class Estimate:
    """Statistics that a layer is to have.

    Attributes:
        mean: Shape ``(C,)``, float64.
        var: The unbiased estimate, shape ``(C,)``, float64.
        values: Values per channel that they come from.
    """

    mean: Tensor
    var: Tensor
    values: int


# From a layer, the moments of what arrives at it, and the number of samples behind them.
Estimator = Callable[[BatchNormLayer, Moments, int], Estimate]


@dataclass(frozen=True, eq=False, kw_only=True)
class Job:
    """A calibration to do.

    Attributes:
        model: The model, in eval mode, with statistics that may be written to.
        device: Where it is.
        noise: How far sums in another order come out different, as a share of their terms.
        layers: The layers to compute.
        batches: This rank's share of the data.
        samples: How many samples that is at most.
        forward: How the model is called; None for the way that most loaders mean.
        estimate: What becomes a layer's statistics.
        on_nonfinite: What to do about a batch with NaN or Inf at a layer.
        memory: Bytes that the set may take at once.
        tolerance: Stop at this standard error, as a share of the standard deviation.
        ranks: Who takes part.
        progress: Is told how far it is.
    """

    model: nn.Module
    device: torch.device
    noise: float
    layers: tuple[BatchNormLayer, ...]
    batches: Iterator[Batch]
    samples: int
    forward: Forward | None
    estimate: Estimator
    on_nonfinite: OnNonfinite
    memory: int
    tolerance: float | None
    ranks: Ranks
    progress: Progress

    def run(self, batch: Batch) -> None:
        """Put a copy of a batch through the model, which may write to it."""
        call(self.model, self.forward, batch.copied())

    def refuse(self, batch: Batch, layer: BatchNormLayer) -> None:
        """Accept that a batch with NaN or Inf is left out, or raise.

        Raises:
            CalibrationError: ``on_nonfinite`` is ``"error"``.
        """
        if self.on_nonfinite == "error":
            raise CalibrationError(
                f"batch {batch.index} has NaN or Inf where it arrives at {layer.name}: mend the "
                "data, or leave such batches out with on_nonfinite='skip'"
            )


@dataclass(frozen=True, eq=False, kw_only=True)
class Calibration:
    """What came of a job, over all ranks.

    Attributes:
        estimates: What the layers that were reached are to have, by name.
        samples: Samples used.
        batches: Batches used.
        virtual_batches: As how many virtual batches they ran; 1 is exact.
        left_out: Batches left out since they had NaN or Inf.
        is_within_tolerance: Whether the standard errors came below the tolerance.
    """

    estimates: Mapping[str, Estimate]
    samples: int
    batches: int
    virtual_batches: int
    left_out: int
    is_within_tolerance: bool = False


def unbiased(layer: BatchNormLayer, moments: Moments, samples: int) -> Estimate:
    """Estimate the statistics from the moments alone: mean, and variance divided by n - 1.

    Raises:
        CalibrationError: There are fewer than two values a channel.
    """
    if moments.count < 2:
        raise CalibrationError(
            f"{layer.name}: {moments.count} value a channel is too few for a variance: use more "
            "samples"
        )
    return Estimate(moments.mean, moments.var_unbiased, moments.count)
