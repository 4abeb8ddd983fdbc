"""The averaging that is usual elsewhere: each batch is normalised by its own statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from bnguard.errors import CalibrationError, ConfigurationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.layer_inputs import arrivals, arrived_moments, is_finite, on_host
from bnguard.recalibration.statistics import (
    Calibration,
    Estimate,
    Estimator,
    Job,
    Pool,
    is_precise,
    unbiased,
    write_statistics,
)

# Ranks look at one another, and at the tolerance, every so many batches.
_BATCHES_A_ROUND = 8


def calibrate_precisely(job: Job) -> Calibration:
    """Pool what arrives at each layer in batches that are normalised by their own statistics.

    Only one batch is held at a time, and a layer may be called as often as it likes. The pooling
    is without error, the variance between batches included; but what arrives below the first
    layer was normalised by one batch's own statistics, so the noise of small batches stays in it
    (Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3).

    Raises:
        CalibrationError: There is no data, or the statistics cannot be computed from it.
    """
    mine = _Share()
    job.progress.start(job.samples, 1)
    is_precise_enough = False
    while not is_precise_enough and any(job.ranks.together(partial(_run_round, job, mine))):
        if job.tolerance is not None:
            is_precise_enough = is_precise(_on_all_ranks(job, mine).parts, job.tolerance)
    shares = job.ranks.together(lambda: (mine.samples, mine.batches, mine.left_out))
    samples, batches, left_out = (sum(column) for column in zip(*shares, strict=True))
    _require_samples(samples, left_out)
    return Calibration(
        estimates={
            job.layers[index].name: job.estimate(job.layers[index], moments, samples)
            for index, moments in _on_all_ranks(job, mine).merged().items()
        },
        samples=samples,
        batches=batches,
        virtual_batches=batches,
        left_out=left_out,
        is_within_tolerance=is_precise_enough,
    )


def calibrate_by_moving_average(job: Job) -> Calibration:
    """Move the statistics batch by batch as training does, with the layer's own momentum.

    For comparison only: what comes out depends on the last few batches most.

    Raises:
        CalibrationError: There is no data, or the statistics cannot be computed from it.
        ConfigurationError: There are several ranks.
    """
    if job.ranks.size > 1:
        raise ConfigurationError("method 'ema' runs on one process: use method 'exact'")
    averages = [_MovingAverage.of(layer) for layer in job.layers]
    samples = batches = left_out = 0
    job.progress.start(job.samples, 1)
    for batch in job.batches:
        arrived = _arrived(job, batch)
        if arrived is None:
            left_out += 1
            continue
        samples, batches = samples + batch.size, batches + 1
        for index, calls in arrived.items():
            for moments in calls:
                averages[index].update(moments)
    _require_samples(samples, left_out)
    return Calibration(
        estimates={
            layer.name: Estimate(average.mean, average.var, average.values)
            for layer, average in zip(job.layers, averages, strict=True)
            if average.values
        },
        samples=samples,
        batches=batches,
        virtual_batches=batches,
        left_out=left_out,
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
        arrived = _arrived(job, batch)
        if arrived is None:
            mine.left_out += 1
            continue
        mine.pool.add(arrived)
        mine.samples += batch.size
        mine.batches += 1
    return count


def _on_all_ranks(job: Job, mine: _Share) -> Pool:
    whole = Pool()
    for parts in job.ranks.together(lambda: mine.pool.parts):
        whole.add(parts)
    return whole


def _arrived(job: Job, batch: Batch) -> Mapping[int, list[Moments]] | None:
    """Return what arrives at each layer where each call is normalised by its own statistics.

    None where NaN or Inf arrives somewhere.
    """
    arrived: dict[int, list[Moments]] = {}
    bad: list[int] = []

    def normalise(index: int, values: Tensor) -> None:
        moments = arrived_moments(values)
        if is_finite(moments):
            write_statistics(job.layers[index], moments.mean, moments.var_biased)
            arrived.setdefault(index, []).append(on_host(moments))
        else:
            bad.append(index)

    with arrivals(job.layers, normalise):
        job.run(batch)
    job.progress.advance(batch.size)
    if not bad:
        return arrived
    job.refuse(batch, job.layers[bad[0]])
    return None


def _require_samples(samples: int, left_out: int) -> None:
    if samples == 0 and left_out:
        raise CalibrationError("every batch brings NaN or Inf to a BN layer: mend the data")
    if samples == 0:
        raise CalibrationError("the loader is empty: it yields no sample to calibrate on")


@dataclass
class _MovingAverage:
    """Running statistics as PyTorch moves them in training.

    Attributes:
        mean: Shape ``(C,)``, float64.
        var: The unbiased estimate, shape ``(C,)``, float64.
        momentum: Weight of the new value; None for a cumulative average.
        updates: How many there were, those of training included.
        values: Values per channel seen.
    """

    mean: Tensor
    var: Tensor
    momentum: float | None
    updates: int
    values: int = 0

    @classmethod
    def of(cls, layer: BatchNormLayer) -> _MovingAverage:
        mean, var, counter = layer.running_mean, layer.running_var, layer.counter
        assert mean is not None
        assert var is not None
        updates = 0 if counter is None else int(counter)
        return cls(mean.cpu().double(), var.cpu().double(), layer.momentum, updates)

    def update(self, moments: Moments) -> None:
        self.updates += 1
        self.values += moments.count
        weight = 1 / self.updates if self.momentum is None else self.momentum
        if moments.count > 1:
            self.mean = torch.lerp(self.mean, moments.mean, weight)
            self.var = torch.lerp(self.var, moments.var_unbiased, weight)


# Statistics of new data, mixed with those that the model was trained with.


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
            f"{layer.name}: the statistics to mix with are not finite: use prior 0"
        )
    return mean.cpu().double(), var.cpu().double()
