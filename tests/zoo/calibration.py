"""``python -m tests.zoo.calibration``: the evidence behind each limit, faulty against healthy.

For each measure that a limit is held against: its quantiles over the healthy runs, and over the
runs with the faults that it is there to find. A limit belongs between the two; the margin is how
many times the worst healthy run of 95 % stays within it. A fault that another limit of its rule
finds is among the faulty runs too, so that not all of them lie beyond.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence

import numpy as np

from bnguard.observe.history import EvalWindow, History
from bnguard.rules.bn103_momentum_out_of_range import MomentumOutOfRange
from bnguard.rules.bn106_unsynchronised_small_batch import UnsynchronisedSmallBatch
from bnguard.rules.bn107_accumulation_blind import AccumulationBlind
from bnguard.rules.bn201_variance_collapse import VarianceCollapse
from bnguard.rules.bn202_noisy_batch_statistics import NoisyBatchStatistics
from bnguard.rules.bn203_correlated_batches import CorrelatedBatches
from bnguard.rules.bn204_dead_channels import DeadChannels
from bnguard.rules.bn205_double_update import DoubleUpdate
from bnguard.rules.bn207_several_streams import SeveralStreams, distances
from bnguard.rules.bn210_rank_disagreement import RankDisagreement
from bnguard.rules.bn211_padded_input import PaddedInput
from bnguard.rules.bn301_statistic_drift import StatisticDrift
from bnguard.rules.bn302_mode_gap import ModesDisagree
from bnguard.rules.bn303_unconverged_statistics import UnconvergedStatistics
from bnguard.rules.bn304_stale_statistics import StaleStatistics
from bnguard.rules.bn305_input_shift import InputShift
from bnguard.rules.bn403_amplifying_channel import AmplifyingChannel
from bnguard.rules.measurements import drift, excess_change
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
    return _of_evaluated(history, lambda seen: seen.padding_share)


def spread_of_padding(history: History) -> float | None:
    return _of_evaluated(history, lambda seen: seen.padding_spread)


def _of_evaluated(history: History, measure: Callable[[EvalWindow], float]) -> float | None:
    seen = [layer.evaluated for layer in history.layers if layer.evaluated is not None]
    return _largest([measure(window) for window in seen])


def samples(history: History) -> float | None:
    """Samples a call of the layer that has the fewest; small is bad."""
    return min((layer.samples for layer in history.layers if layer.samples), default=None)


def values_per_channel(history: History) -> float | None:
    """Values per channel of the layer that has the fewest; small is bad."""
    known = [layer.typical_values_per_channel for layer in history.layers]
    return min((n for n in known if n), default=None)


def momentum(history: History) -> float | None:
    return _largest([layer.momentum for layer in history.layers if layer.is_momentum_known])


def dead_share(history: History) -> float | None:
    """Share of channels without variance in any batch, of the worst layer."""
    dead = DeadChannels()
    return _largest(
        [
            float(found.mean())
            for layer in history.layers
            if layer.window is not None and (found := dead.dead(layer)) is not None
        ]
    )


def recomputed_share(history: History) -> float | None:
    return _largest(
        [
            layer.calls.recomputed / layer.calls.in_training
            for layer in history.layers
            if layer.calls.in_training
        ]
    )


def ratio_of_streams(history: History) -> float | None:
    return _largest(
        [distances(layer.streams)[1] for layer in history.layers if len(layer.streams) > 1]
    )


def distance_of_ranks(history: History) -> float | None:
    return _largest(
        [
            float(np.nanquantile(np.abs(layer.rank_shift_std), 0.9))
            for layer in history.layers
            if layer.rank_shift_std is not None
        ]
    )


def ratio_of_layers(history: History) -> float | None:
    """|log variance ratio| against the running one, the upper decile, of the worst layer."""
    return _largest(
        [
            float(np.nanquantile(np.abs(layer.eval_log_variance_ratio), 0.9))
            for layer in history.layers
            if layer.eval_log_variance_ratio is not None
        ]
    )


def drift_after_new_weights(history: History) -> float | None:
    return drift_of_layers(history) if history.run.has_new_weights_in_evaluation else None


def ratio_after_new_weights(history: History) -> float | None:
    return ratio_of_layers(history) if history.run.has_new_weights_in_evaluation else None


def initial_statistics_left(history: History) -> float | None:
    return _largest([layer.initial_weight for layer in history.layers])


MEASURES: tuple[tuple[str, str, float | None, Measure], ...] = (
    ("BN103", "momentum", MomentumOutOfRange().max_momentum, momentum),
    ("BN106", "samples per rank", UnsynchronisedSmallBatch().min_samples, samples),
    ("BN107", "samples per batch", AccumulationBlind().min_samples, samples),
    (
        "BN201",
        "values per channel",
        VarianceCollapse().min_values_per_channel,
        values_per_channel,
    ),
    ("BN201", "within-batch share", VarianceCollapse().min_within_batch_share, within_batch_share),
    ("BN202", "spread of batch means, σ", NoisyBatchStatistics().max_noise_std, noise_of_batches),
    ("BN203", "variance ratio of batches", None, variance_ratio_of_batches),
    ("BN204", "share of dead channels", DeadChannels().max_dead_share, dead_share),
    ("BN205", "recomputed share", DoubleUpdate().max_recomputed_share, recomputed_share),
    ("BN207", "distance of streams, σ", SeveralStreams().max_distance_std, distance_of_streams),
    ("BN207", "log ratio of streams", SeveralStreams().max_log_variance_ratio, ratio_of_streams),
    ("BN210", "distance of ranks, σ", RankDisagreement().max_distance_std, distance_of_ranks),
    ("BN211", "padding share", PaddedInput().max_padding_share, padding),
    ("BN211", "spread of padding", PaddedInput().max_padding_spread, spread_of_padding),
    ("BN301", "shift of the worst layer, σ", StatisticDrift().max_shift_std, drift_of_layers),
    ("BN301", "log ratio, worst layer", StatisticDrift().max_log_variance_ratio, ratio_of_layers),
    ("BN302", "excess change, σ", ModesDisagree().max_excess_change, excess_of_modes),
    ("BN302", "flipped share", ModesDisagree().max_flipped_share, flipped_share),
    (
        "BN303",
        "initial statistics left",
        UnconvergedStatistics().max_initial_weight,
        initial_statistics_left,
    ),
    (
        "BN304",
        "shift after new weights, σ",
        StaleStatistics().max_shift_std,
        drift_after_new_weights,
    ),
    (
        "BN304",
        "log ratio after them",
        StaleStatistics().max_log_variance_ratio,
        ratio_after_new_weights,
    ),
    ("BN305", "shift of the input, σ", InputShift().max_shift_std, shift_of_input),
    ("BN305", "log ratio of the input", InputShift().max_log_variance_ratio, log_ratio_of_input),
    (
        "BN403",
        "largest normalised value, σ",
        AmplifyingChannel().max_normalised_std,
        largest_normalised,
    ),
)


def calibration(faulty: Sequence[FaultyRun], healthy: Sequence[HealthyRun]) -> str:
    """Return a table: each measure, its limit and margin, its quantiles on both kinds of run."""
    good = [run.twin.report.history for run in faulty]
    good += [run.watched.report.history for run in healthy]
    columns = "5 %, median, 95 %, most"
    lines = [
        f"{'measure':<36}{'limit':>7}{'margin':>8}   {'healthy: ' + columns:<38}faulty: {columns}"
    ]
    for code, name, limit, measure in MEASURES:
        bad = [run.faulty.report.history for run in faulty if run.code == code]
        well, ill = _known(good, measure), _known(bad, measure)
        lines.append(
            f"{code + ' ' + name:<36}{'–' if limit is None else f'{limit:g}':>7}"
            f"{_margin(limit, well, ill):>8}   {_quantiles(well):<38}{_quantiles(ill)}"
        )
    return "\n".join(lines)


def _known(histories: list[History], measure: Measure) -> list[float]:
    values = [measure(history) for history in histories]
    return [value for value in values if value is not None and np.isfinite(value)]


def _margin(limit: float | None, healthy: list[float], faulty: list[float]) -> str:
    if limit is None or not healthy or not faulty:
        return "–"
    if np.median(faulty) < np.median(healthy):
        return f"{np.quantile(healthy, 0.05) / limit:.2g}"
    worst = np.quantile(healthy, 0.95)
    return f"{limit / worst:.2g}" if worst > 0.0 else "∞"


def _quantiles(values: list[float]) -> str:
    if not values:
        return "–"
    return ", ".join(f"{value:.3g}" for value in np.quantile(values, [0.05, 0.5, 0.95, 1.0]))


def main() -> None:
    parser = argparse.ArgumentParser("python -m tests.zoo.calibration", description=__doc__)
    parser.add_argument("--seeds", "--seed", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--only", default="", help="the runs whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    options = parser.parse_args()
    with np.errstate(all="ignore"):
        print(calibration(*run_zoo(options.seeds, only=options.only, jobs=options.jobs)))


if __name__ == "__main__":
    main()
