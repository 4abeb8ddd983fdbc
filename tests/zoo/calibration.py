"""``python -m tests.zoo.calibration``: the evidence behind each limit, faulty against healthy.

For each measure that a limit is held against: its quantiles over the healthy runs, and over the
runs with the fault that it is there to find. A limit belongs between the two.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import numpy as np

from bnguard.history import History
from bnguard.rules import (
    CorrelatedBatches,
    InputShift,
    ModesDisagree,
    NoisyBatchStatistics,
    SeveralStreams,
    StatisticDrift,
)
from bnguard.rules.measures import drift, excess_change
from bnguard.rules.several_streams import distances
from tests.zoo.runs import FaultyRun, HealthyRun, run_zoo

Measure = Callable[[History], float | None]


def _largest(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return max(known, default=None)


def excess_of_modes(history: History) -> float | None:
    """Change of the outputs between the modes, without what sampling explains."""
    return None if history.run.mode_gap is None else excess_change(history.run.mode_gap)


def flipped_share(history: History) -> float | None:
    return None if history.run.mode_gap is None else history.run.mode_gap.flipped_share


def drift_of_layers(history: History) -> float | None:
    """Shift of the mean against the running one, the upper decile, of the worst layer."""
    return _largest(
        [
            float(np.nanquantile(shift, 0.9))
            for layer in history.layers
            if layer.evaluated is not None
            for shift, _ in [
                drift(
                    layer.evaluated,
                    layer.evaluated.running.mean,
                    layer.evaluated.running.var,
                    layer.eps,
                )
            ]
        ]
    )


def _shift_of_input(history: History, index: int) -> float | None:
    layer = next(iter(history.layers_in_order), None)
    if layer is None or layer.evaluated is None or layer.window is None:
        return None
    seen, running = layer.evaluated, layer.evaluated.running
    by_window = drift(seen, layer.window.mean, layer.window.var_unbiased, layer.eps)[index]
    by_running = drift(seen, running.mean, running.var, layer.eps)[index]
    return float(np.nanquantile(np.minimum(by_window, by_running), 0.9))


def shift_of_input(history: History) -> float | None:
    return _shift_of_input(history, 0)


def log_ratio_of_input(history: History) -> float | None:
    return _shift_of_input(history, 1)


def variance_ratio_of_batches(history: History) -> float | None:
    """Variance of batch means over the expected one, the median over features."""
    inputs = history.run.inputs
    if inputs is None or inputs.batches < CorrelatedBatches().min_batches:
        return None
    return float(np.median(inputs.variance_ratio))


def noise_of_batches(history: History) -> float | None:
    """Spread of the batch means in σ, the median over channels, of the worst layer."""
    return _largest(
        [
            float(np.nanmedian(layer.window.noise_std))
            for layer in history.layers
            if layer.window is not None
            and np.nanmax(layer.window.batches) >= NoisyBatchStatistics().min_batches
            and not np.isnan(layer.window.noise_std).all()
        ]
    )


def within_batch_share(history: History) -> float | None:
    """Share of the variance that lies within batches, of the worst layer; small is bad."""
    shares = [
        float(np.nanmedian(1.0 - layer.window.noise_std**2))
        for layer in history.layers
        if layer.window is not None and not np.isnan(layer.window.noise_std).all()
    ]
    return min(shares, default=None)


def distance_of_streams(history: History) -> float | None:
    return _largest(
        [distances(layer.streams)[0] for layer in history.layers if len(layer.streams) > 1]
    )


def largest_normalised(history: History) -> float | None:
    return _largest(
        [
            layer.evaluated.largest_normalised_std
            for layer in history.layers
            if layer.evaluated is not None
        ]
    )


def padding(history: History) -> float | None:
    return _largest(
        [layer.evaluated.padding_share for layer in history.layers if layer.evaluated is not None]
    )


MEASURES: tuple[tuple[str, str, float | None, Measure], ...] = (
    ("BN201", "within-batch share", 0.2, within_batch_share),
    ("BN202", "spread of batch means, σ", NoisyBatchStatistics().max_noise_std, noise_of_batches),
    ("BN203", "variance ratio of batches", None, variance_ratio_of_batches),
    ("BN207", "distance of streams, σ", SeveralStreams().max_distance_std, distance_of_streams),
    ("BN211", "padding share", 0.2, padding),
    ("BN301", "shift of the worst layer, σ", StatisticDrift().max_shift_std, drift_of_layers),
    ("BN302", "excess change, σ", ModesDisagree().max_excess_change, excess_of_modes),
    ("BN302", "flipped share", ModesDisagree().max_flipped_share, flipped_share),
    ("BN305", "shift of the input, σ", InputShift().max_shift_std, shift_of_input),
    ("BN305", "log ratio of the input", InputShift().max_log_variance_ratio, log_ratio_of_input),
    ("BN403", "largest normalised value, σ", 100.0, largest_normalised),
)


def calibration(faulty: list[FaultyRun], healthy: list[HealthyRun]) -> str:
    """Return a table: each measure, its limit, and its quantiles on healthy and faulty runs."""
    good = [run.twin.report.history for run in faulty]
    good += [run.watched.report.history for run in healthy]
    lines = [f"{'measure':<36}{'limit':>7}   {'healthy: 5 %, median, 95 %, max':<36}faulty, same"]
    for code, name, limit, measure in MEASURES:
        bad = [run.faulty.report.history for run in faulty if run.code == code]
        written = "–" if limit is None else f"{limit:g}"
        lines.append(
            f"{code + ' ' + name:<36}{written:>7}   {_quantiles(good, measure):<36}"
            f"{_quantiles(bad, measure)}"
        )
    return "\n".join(lines)


def _quantiles(histories: list[History], measure: Measure) -> str:
    known = [value for history in histories if (value := measure(history)) is not None]
    known = [value for value in known if np.isfinite(value)]
    if not known:
        return "–"
    return ", ".join(f"{value:.3g}" for value in np.quantile(known, [0.05, 0.5, 0.95, 1.0]))


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.zoo.calibration", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    seeds = parser.parse_args().seeds
    with np.errstate(all="ignore"):
        print(calibration(*run_zoo(seeds, jobs=os.cpu_count() or 1)))


if __name__ == "__main__":
    main()
