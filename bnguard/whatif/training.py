"""What the training data tell of how the stored statistics came about."""

from __future__ import annotations

import math

import numpy as np

from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.recalibration.result import LayerChange
from bnguard.whatif.bench import CHANNEL_QUANTILE, Bench
from bnguard.whatif.cures import Cure
from bnguard.whatif.evidence import Training

# The quantile of the absolute value of a normal variable that CHANNEL_QUANTILE is: 90 %.
_NORMAL_QUANTILE = 1.645


def told_by_training(bench: Bench, from_data: Cure, from_batches: Cure) -> Training:
    """Return what the training data tell.

    Args:
        bench: The model on the training data.
        from_data: Statistics of all of them.
        from_batches: What training on their batches would store.
    """
    samples = bench.samples
    order, change, flipped_share = samples.order, None, None
    if order is not None and order.is_sorted:
        shuffled = bench.outputs_in_shuffled_batches()
        if shuffled is not None:
            as_they_come = bench.outputs_in_batches(samples.batches)
            change = as_they_come.change_from(shuffled)
            flipped_share = as_they_come.flipped_share(shuffled)
    return Training(
        batch_size=samples.batch_size,
        order=order,
        change=change,
        flipped_share=flipped_share,
        from_data=_distance(from_data),
        from_batches=_distance(from_batches),
        from_batches_by_noise=_noise(bench),
    )


def _distance(cure: Cure) -> float:
    """Return the mean distance over the layers; means are left out, as batch order moves them.

    NaN where no layer has statistics, as of batches of one value per channel.
    """
    distances = [_log_variance_ratio(change) for change in cure.changes.values()]
    return float(np.mean(distances)) if distances else math.nan


def _log_variance_ratio(change: LayerChange) -> float:
    return float(np.quantile(np.abs(change.log_variance_ratio), CHANNEL_QUANTILE))


def _noise(bench: Bench) -> float:
    """Return the log-variance ratio that a running average over so small batches has by chance.

    The variance of n normal values has a relative variance of 2 / (n - 1), of which an average
    with momentum m keeps m / (2 - m).
    """
    size = bench.samples.batch_size
    per_layer = [
        _layer_noise(layer, size * bench.values_per_sample[layer.name])
        for layer in bench.layers
        if layer.name in bench.values_per_sample
    ]
    return float(np.mean(per_layer))


def _layer_noise(layer: BatchNormLayer, values: int) -> float:
    momentum = layer.momentum
    # A cumulative average of a hundred batches; more leave no noise to speak of.
    kept = 0.01 if momentum is None else momentum / max(2.0 - momentum, 1.0)
    return _NORMAL_QUANTILE * math.sqrt(2.0 / max(values - 1, 1) * kept)
