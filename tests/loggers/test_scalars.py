"""The numbers that every logger gets, against those of the report."""

import dataclasses

import numpy as np
import pytest

import bnguard
from bnguard.loggers.scalars import layer_quantiles, scalars_of
from bnguard.observe.history import ModeGap
from bnguard.rules import RULES
from bnguard.rules.measurements import distance_of
from bnguard.tensorboard.metadata import Metric, standard_metrics
from tests.networks import conv_net, train

SUMMARY = {"shift", "variance", "mode_gap", "values_per_channel", "findings"}


@pytest.fixture(scope="module")
def report():
    model = conv_net(momentum=0.01)
    with bnguard.watch(model, on_findings=lambda group: None) as monitor:
        train(model, monitor)
        return monitor.report()


def test_five_scalars_relative_to_the_limits_of_the_rules(report):
    scalars = scalars_of(report, RULES, "summary")
    assert set(scalars) == {f"zz_bnguard/{name}" for name in SUMMARY}
    measured = [distance_of(layer).measured for layer in report.layers]
    worst = max(shift.value / shift.limit for shift, _ in measured)
    assert scalars["zz_bnguard/shift"] == pytest.approx(worst, rel=1e-6)
    worst = max(ratio.value / ratio.limit for _, ratio in measured)
    assert scalars["zz_bnguard/variance"] == pytest.approx(worst, rel=1e-6)
    fewest = min(layer.typical_values_per_channel for layer in report.layers)
    (rule,) = (rule for rule in RULES if rule.code == "BN201")
    assert scalars["zz_bnguard/values_per_channel"] == rule.min_values_per_channel / fewest
    assert scalars["zz_bnguard/findings"] == sum(f.severity > 1 for f in report.findings)


@pytest.mark.parametrize(("flipped_share", "limit"), [(None, 0.75), (0.05, 0.75), (0.5, 0.3)])
def test_the_mode_gap_is_relative_to_the_limit_that_counts(report, flipped_share, limit):
    gap = ModeGap(relative_change=0.6, sampling_change=0.0, flipped_share=flipped_share, samples=64)
    run = dataclasses.replace(report.history.run, mode_gap=gap)
    changed = dataclasses.replace(report, history=dataclasses.replace(report.history, run=run))
    scalars = scalars_of(changed, RULES, "summary")
    assert scalars["zz_bnguard/mode_gap"] == pytest.approx(0.6 / limit)


def test_what_has_no_limit_or_was_not_measured_is_not_logged(report):
    rules = [rule for rule in RULES if rule.code not in ("BN201", "BN302")]
    names = {name.partition("/")[2] for name in scalars_of(report, rules, "summary")}
    assert names == SUMMARY - {"values_per_channel", "mode_gap"}
    inspected = bnguard.inspect(conv_net())
    assert set(scalars_of(inspected, RULES, "summary")) == {"zz_bnguard/findings"}


def test_more_scalars_only_if_asked_for(report):
    assert scalars_of(report, RULES, "none") == {}
    everything = scalars_of(report, RULES, "all")
    assert len(everything) == 5 + 32
    assert everything.items() >= scalars_of(report, RULES, "summary").items()


def metric(**fields):
    return Metric(name="", unit="", description="", panel="", **fields)


def test_four_scalars_a_metric_whatever_the_number_of_layers():
    metrics = standard_metrics()
    scalars = layer_quantiles(metrics, np.ones((len(metrics), 200)))
    assert len(scalars) == 4 * sum(metric.has_quantiles for metric in metrics) == 32


def test_quantiles_over_the_layers_leave_out_what_is_not_finite():
    values = [[*range(101), np.nan, np.inf]]
    scalars = layer_quantiles([metric(key="gain")], values)
    assert scalars == {
        "zz_bnguard/gain/p05": 5.0,
        "zz_bnguard/gain/p50": 50.0,
        "zz_bnguard/gain/p95": 95.0,
        "zz_bnguard/gain/max": 100.0,
    }


def test_the_worst_layer_is_on_the_side_of_the_fault():
    values = [[1.0, 9.0], [-3.0, 2.0]]
    sides = [metric(key="n", limit_side="below"), metric(key="r", limit_side="either")]
    scalars = layer_quantiles(sides, values)
    assert scalars["zz_bnguard/n/min"] == 1.0
    assert scalars["zz_bnguard/r/max"] == 3.0
    assert "zz_bnguard/n/max" not in scalars


def test_a_metric_that_nobody_observed_has_no_scalars():
    assert layer_quantiles([metric(key="n")], [[np.nan, np.nan]]) == {}
