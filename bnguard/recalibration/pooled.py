"""Pool statistics over batches, and mix new statistics with those that a model was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.statistics import (
    Calibration,
    Estimate,
    Estimator,
    Job,
    Pool,
    current_statistics,
    estimate_unbiased,
    input_moments,
    is_precise,
    read_inputs,
    replace_statistics,
)

# Ranks exchange results, and compare them with the tolerance, after this number of batches.
_BATCHES_PER_ROUND = 8


def calibrate_precisely(job: Job) -> Calibration:
    """Pool the inputs of each layer over batches that are normalised by their own statistics.

    Only one batch is held at a time, and a layer may be called any number of times. The pooling is
    exact, the variance between batches included; but the inputs below the first layer were
    normalised by the statistics of one batch, so they contain the noise of small batches
    (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3).

    Raises:
        CalibrationError: There is no data, or the statistics cannot be computed from it.
    """
    mine, left_out = Pool(), 0
    job.progress.start(job.samples, 1)
    is_precise_enough = False
    while not is_precise_enough:
        rounds = job.ranks.together(partial(_run_round, job, mine))
        left_out += sum(refused for _, refused in rounds)
        if not any(read for read, _ in rounds):
            break
        if job.tolerance is not None:
            is_precise_enough = is_precise(_pool_all_ranks(job, mine).parts, job.tolerance)
    pool = _pool_all_ranks(job, mine)
    if pool.samples == 0:
        raise CalibrationError(
            "every batch brings NaN or Inf to a BN layer: fix the data"
            if left_out
            else "the loader is empty: it yields no sample to calibrate on"
        )
    return Calibration(
        estimates=job.estimate_from(pool),
        samples=pool.samples,
        batches=pool.batches,
        virtual_batches=pool.batches,
        left_out=left_out,
        is_within_tolerance=is_precise_enough,
    )


def _run_round(job: Job, mine: Pool) -> tuple[int, int]:
    """Add the next few batches to the pool; return how many were read, and how many refused."""
    read = refused = 0
    for batch in islice(job.batches, _BATCHES_PER_ROUND):
        read += 1
        inputs = _run_batch(job, batch)
        if inputs is None:
            refused += 1
        else:
            mine.add(inputs, batch.size, 1)
    return read, refused


def _pool_all_ranks(job: Job, mine: Pool) -> Pool:
    whole = Pool()
    for share in job.ranks.together(lambda: (mine.parts, mine.samples, mine.batches)):
        whole.add(*share)
    return whole


def _run_batch(job: Job, batch: Batch) -> Mapping[int, list[Moments]] | None:
    """Run a batch normalised by its own statistics; return the moments of the layers' inputs.

    None if there is NaN or Inf among the inputs.
    """
    inputs: dict[int, list[Moments]] = {}
    bad: list[int] = []

    def normalise(index: int, values: Tensor) -> None:
        moments = input_moments(values)
        if moments.is_finite:
            replace_statistics(job.layers[index], moments.mean, moments.var_biased)
            inputs.setdefault(index, []).append(moments.on_host())
        else:
            bad.append(index)

    with read_inputs(job.layers, normalise):
        job.run(batch)
    job.progress.advance(batch.size)
    if not bad:
        return inputs
    job.refuse(batch, job.layers[bad[0]])
    return None


def mix_with_source(layers: Sequence[BatchNormLayer], prior: float) -> Estimator:
    """Return an estimator that mixes new statistics with those that the layers have now.

    The source has weight N/(N + n), for a prior of N samples and n new ones; 0 forgets it, which
    is AdaBN (Li et al., "Revisiting batch normalization for practical domain adaptation", 2016).
    Means and variances are mixed alike (Schneider et al., "Improving robustness against common
    corruptions by covariate shift adaptation", 2020, equation 3).

    Raises:
        CalibrationError: The statistics to mix with are not finite.
    """
    sources: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        mean, var = current_statistics(layer)
        if not bool(torch.isfinite(mean).all() and torch.isfinite(var).all()):
            raise CalibrationError(
                f"{layer.label}: the statistics to mix with are not finite: use prior 0"
            )
        sources[layer.name] = mean.cpu().double(), var.cpu().double()

    def mix(layer: BatchNormLayer, moments: Moments, samples: int) -> Estimate:
        new = estimate_unbiased(layer, moments, samples)
        mean, var = sources[layer.name]
        weight = samples / (prior + samples)
        return Estimate(
            torch.lerp(mean, new.mean, weight), torch.lerp(var, new.var, weight), new.values
        )

    return mix
