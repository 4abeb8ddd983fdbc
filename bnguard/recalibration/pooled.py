"""Pool statistics over batches, and mix new statistics with those that a model was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.layer_inputs import input_moments, is_finite, on_host, read_inputs
from bnguard.recalibration.statistics import (
    Calibration,
    Estimate,
    Estimator,
    Job,
    Pool,
    estimate_unbiased,
    is_precise,
    write_statistics,
)

# Ranks look at one another, and at the tolerance, every so many batches.
_BATCHES_A_ROUND = 8


def calibrate_precisely(job: Job) -> Calibration:
    """Pool the inputs of each layer over batches that are normalised by their own statistics.

    Only one batch is held at a time, and a layer may be called any number of times. The pooling is
    exact, the variance between batches included; but the inputs below the first layer were
    normalised by the statistics of one batch, so they contain the noise of small batches
    (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3).

    Raises:
        CalibrationError: There is no data, or the statistics cannot be computed from it.
    """
    mine = _Share()
    job.progress.start(job.samples, 1)
    is_precise_enough = False
    while not is_precise_enough and any(job.ranks.together(partial(_run_round, job, mine))):
        if job.tolerance is not None:
            is_precise_enough = is_precise(_pool_of_all_ranks(job, mine).parts, job.tolerance)
    shares = job.ranks.together(lambda: (mine.samples, mine.batches, mine.left_out))
    samples, batches, left_out = (sum(column) for column in zip(*shares, strict=True))
    _require_samples(samples, left_out)
    return Calibration(
        estimates={
            job.layers[index].name: job.estimate(job.layers[index], moments, samples)
            for index, moments in _pool_of_all_ranks(job, mine).merged().items()
        },
        samples=samples,
        batches=batches,
        virtual_batches=batches,
        left_out=left_out,
        is_within_tolerance=is_precise_enough,
    )


@dataclass
class _Share:
    """What this rank has done so far."""

    pool: Pool = field(default_factory=Pool)
    samples: int = 0
    batches: int = 0
    left_out: int = 0


def _run_round(job: Job, mine: _Share) -> int:
    """Run the next few batches; return how many there were."""
    count = 0
    for batch in islice(job.batches, _BATCHES_A_ROUND):
        count += 1
        inputs = _run_batch(job, batch)
        if inputs is None:
            mine.left_out += 1
            continue
        mine.pool.add(inputs)
        mine.samples += batch.size
        mine.batches += 1
    return count


def _pool_of_all_ranks(job: Job, mine: _Share) -> Pool:
    whole = Pool()
    for parts in job.ranks.together(lambda: mine.pool.parts):
        whole.add(parts)
    return whole


def _run_batch(job: Job, batch: Batch) -> Mapping[int, list[Moments]] | None:
    """Run a batch normalised by its own statistics; return the moments of the layers' inputs.

    None if there is NaN or Inf among the inputs.
    """
    inputs: dict[int, list[Moments]] = {}
    bad: list[int] = []

    def normalise(index: int, values: Tensor) -> None:
        moments = input_moments(values)
        if is_finite(moments):
            write_statistics(job.layers[index], moments.mean, moments.var_biased)
            inputs.setdefault(index, []).append(on_host(moments))
        else:
            bad.append(index)

    with read_inputs(job.layers, normalise):
        job.run(batch)
    job.progress.advance(batch.size)
    if not bad:
        return inputs
    job.refuse(batch, job.layers[bad[0]])
    return None


def _require_samples(samples: int, left_out: int) -> None:
    if samples == 0 and left_out:
        raise CalibrationError("every batch brings NaN or Inf to a BN layer: fix the data")
    if samples == 0:
        raise CalibrationError("the loader is empty: it yields no sample to calibrate on")


def mix_with_source(layers: Sequence[BatchNormLayer], prior: float) -> Estimator:
    """Return an estimator that mixes new statistics with those that the layers have now.

    The source has weight N/(N + n), for a prior of N samples and n new ones; 0 forgets it, which
    is AdaBN (Li et al., "Revisiting batch normalization for practical domain adaptation", 2016).
    Means and variances are mixed alike (Schneider et al., "Improving robustness against common
    corruptions by covariate shift adaptation", 2020, equation 3).

    Raises:
        CalibrationError: The statistics to mix with are not finite.
    """
    sources: Mapping[str, tuple[Tensor, Tensor]] = {
        layer.name: _read_source(layer) for layer in layers
    }

    def mixed(layer: BatchNormLayer, moments: Moments, samples: int) -> Estimate:
        new = estimate_unbiased(layer, moments, samples)
        mean, var = sources[layer.name]
        weight = samples / (prior + samples)
        return Estimate(
            torch.lerp(mean, new.mean, weight), torch.lerp(var, new.var, weight), new.values
        )

    return mixed


def _read_source(layer: BatchNormLayer) -> tuple[Tensor, Tensor]:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    if not bool(torch.isfinite(mean).all() and torch.isfinite(var).all()):
        raise CalibrationError(
            f"{layer.name}: the statistics to mix with are not finite: use prior 0"
        )
    return mean.cpu().double(), var.cpu().double()
