"""Statistics of new data, mixed with those that the model was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments
from bnguard.recalibration.calibration import Estimate, Estimator, unbiased


def mixed_with_source(layers: Sequence[BatchNormLayer], prior: float) -> Estimator:
    """Return an estimator that mixes new statistics with those that the layers have now.

    The source has weight N/(N + n), for a prior of N samples and n new ones; 0 forgets it, which
    is AdaBN (Li et al., "Revisiting batch normalization for practical domain adaptation", 2016).
    Means and variances are mixed alike (Schneider et al., "Improving robustness against common
    corruptions by covariate shift adaptation", 2020, equation 3).

    Raises:
        CalibrationError: The statistics to mix with are not finite.
    """
    sources: Mapping[str, tuple[Tensor, Tensor]] = {
        layer.name: _source_of(layer) for layer in layers
    }

    def mixed(layer: BatchNormLayer, moments: Moments, samples: int) -> Estimate:
        new = unbiased(layer, moments, samples)
        mean, var = sources[layer.name]
        weight = samples / (prior + samples)
        return Estimate(
            torch.lerp(mean, new.mean, weight), torch.lerp(var, new.var, weight), new.values
        )

    return mixed


def _source_of(layer: BatchNormLayer) -> tuple[Tensor, Tensor]:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    if not bool(torch.isfinite(mean).all() and torch.isfinite(var).all()):
        raise CalibrationError(
            f"{layer.name}: the statistics to mix with are not finite: use prior=0"
        )
    return mean.cpu().double(), var.cpu().double()
