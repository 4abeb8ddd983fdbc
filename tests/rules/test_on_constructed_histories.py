"""Rules whose data cannot be had in one process, and edges that no small run reaches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import bnguard
from bnguard.configuration import with_limits
from bnguard.findings import Severity
from bnguard.observe.history import (
    BadValueOrigin,
    BatchWindow,
    Calls,
    EvalWindow,
    History,
    InputWindow,
    LayerHistory,
    ModeGap,
    Run,
    RunningStatistics,
)
from bnguard.observe.training_plan import Plan
from bnguard.rules import RULES, rule_named
from bnguard.rules.engine import run_rules


def found(code, layer):
    history = History(layers=(layer,), run=layer.run)
    return list(run_rules(history, [rule_named(code)]).findings)


def running(mean=0.0, var=1.0, updates=1000):
    return RunningStatistics(mean=np.full(4, mean), var=np.full(4, var), updates=updates)


def evaluated(mean=0.0, var=1.0, **options):
    return EvalWindow(
        count=10_000,
        batches=4,
        mean=np.full(4, mean),
        var_unbiased=np.full(4, var),
        running=running(),
        step=10,
        **options,
    )


def layer(**options):
    return LayerHistory(
        **{
            "name": "bn",
            "channels": 4,
            "training": True,
            "updates_seen": 100,
            "running": running(),
            "run": Run(steps=100),
            **options,
        }
    )


@pytest.mark.parametrize(("momentum", "proposed"), [(0.6, "0.4"), (0.99, "0.01"), (1.0, "0.001")])
def test_the_momentum_proposed_is_within_the_range(momentum, proposed):
    (finding,) = found("BN103", layer(momentum=momentum))
    assert finding.fix.summary == f"use momentum={proposed}, then recalibrate"


def test_the_largest_momentum_that_is_published_is_within_the_range():
    assert found("BN103", layer(momentum=0.5)) == []


@pytest.mark.parametrize(("between", "fires"), [(1e-8, False), (1.0, True)])
def test_channels_that_do_not_vary_at_all_are_no_collapse(between, fires):
    rows = ("mean", "var_unbiased", "var_max", "var_of_means", "var_of_means_successive")
    window = BatchWindow(
        batches=np.full(4, 20.0), **dict(zip(rows, np.full((5, 4), 1e-9), strict=True))
    )
    window = dataclasses.replace(window, var_of_means_successive=np.full(4, between))
    assert bool(found("BN201", layer(window=window))) is fires


@pytest.mark.parametrize(
    ("ranks", "kind", "samples", "fires"),
    [
        (2, "BatchNorm2d", 2, True),
        (2, "BatchNorm2d", 8, False),
        (1, "BatchNorm2d", 2, False),
        (2, "SyncBatchNorm", 2, False),
    ],
)
def test_bn106(ranks, kind, samples, fires):
    run = Run(steps=10, plan=Plan(ranks=ranks))
    assert bool(found("BN106", layer(kind=kind, samples=samples, run=run))) is fires


@pytest.mark.parametrize(("calls", "fires"), [(5, False), (20, True), (0, True)])
def test_bn104_counts_calls_in_training_and_the_setting_before_it(calls, fires):
    rule = with_limits(rule_named("BN104"), {"max_untracked_calls": 10})
    untracked = layer(running=None, calls=Calls(in_training=calls))
    assert bool(list(rule.check(untracked))) is fires


@pytest.mark.parametrize(("distance", "fires"), [(0.4, True), (0.1, False)])
def test_bn210(distance, fires):
    run = Run(steps=10, plan=Plan(ranks=2))
    shift = np.full(4, distance)
    assert bool(found("BN210", layer(rank_shift_std=shift, run=run))) is fires


GAP = ModeGap(samples=64, relative_change=0.1, sampling_change=0.1, flipped_share=0.0)
HARM = dataclasses.replace(GAP, relative_change=2.0, flipped_share=0.5)


@pytest.mark.parametrize(
    ("run", "severity"),
    [
        (Run(steps=100), Severity.WARNING),
        (Run(steps=100, mode_gap=HARM), Severity.WARNING),
        (Run(steps=100, mode_gap=GAP), Severity.INFO),
        (Run(steps=100, mode_gap=HARM, is_settled=False), Severity.INFO),
        (
            Run(steps=100, mode_gap=HARM, earlier_mode_gaps=(HARM,) * 3, is_settled=False),
            Severity.WARNING,
        ),
    ],
)
def test_bn301_is_as_severe_as_the_mode_gap_and_the_time_allow(run, severity):
    (finding,) = found("BN301", layer(evaluated=evaluated(mean=3.0), run=run))
    assert finding.severity is severity


def test_bn301_tells_lag_from_other_data():
    def window(mean):
        rows = dict.fromkeys(("var_of_means", "var_of_means_successive"), np.zeros(4))
        ones = dict.fromkeys(("var_unbiased", "var_max"), np.ones(4))
        return BatchWindow(
            batches=np.full(4, 20.0),
            mean=np.full(4, mean),
            **rows,
            **ones,
        )

    drifted = layer(evaluated=evaluated(mean=3.0))
    (lag,) = found("BN301", dataclasses.replace(drifted, window=window(3.0)))
    (other,) = found("BN301", dataclasses.replace(drifted, window=window(0.0)))
    assert "lag behind the weights" in lag.message
    assert "because the data differ" in other.message


def test_bn302_is_info_where_all_layers_were_frozen():
    frozen = layer(updates_seen=0, training=False, run=Run(steps=100, mode_gap=HARM))
    assert [f.severity for f in found("BN302", frozen)] == [Severity.INFO]


@pytest.mark.parametrize(("samples", "reason"), [(2, "2 samples"), (0, "not independent samples")])
def test_bn302_does_not_judge_a_gap_that_sampling_may_explain(samples, reason):
    gap = dataclasses.replace(HARM, samples=samples, sampling_change=None)
    judged = run_rules(
        History(layers=(layer(),), run=Run(steps=100, mode_gap=gap)), [rule_named("BN302")]
    )
    assert judged.findings == ()
    assert [reason in skipped.reason for skipped in judged.skipped] == [True]
    broken = dataclasses.replace(gap, relative_change=float("inf"))
    assert found("BN302", layer(run=Run(steps=100, mode_gap=broken)))


@pytest.mark.parametrize(
    ("added", "severity"),
    [([0.6, 0.6, -0.1, -0.1], Severity.WARNING), ([0.0, 0.0, 0.1, 0.1], Severity.INFO)],
)
def test_bn203_looks_for_groups_in_the_channels_in_which_batches_differ(added, severity):
    """In the others, the variance that evaluation adds is noise over next to nothing."""
    grouped = layer(
        position=0,
        samples=32,
        calls=Calls(in_training=100),
        window=BatchWindow(
            batches=np.full(4, 20.0),
            mean=np.zeros(4),
            var_unbiased=np.ones(4),
            var_max=np.ones(4),
            **dict.fromkeys(
                ("var_of_means", "var_of_means_successive"), np.array([1.0, 1.0, 0.001, 0.001])
            ),
        ),
        evaluated=evaluated(var=1.0 + np.array(added)),
        run=Run(steps=100, inputs=InputWindow(batches=20, variance_ratio=np.full(8, 60.0))),
    )
    (finding,) = found("BN203", grouped)
    assert finding.severity is severity


@pytest.mark.parametrize(("share", "spread", "fires"), [(0.4, 0.2, True), (0.4, 0.0, False)])
def test_bn211_needs_padding_that_varies(share, spread, fires):
    seen = evaluated(padding_share=share, padding_spread=spread)
    assert bool(found("BN211", layer(evaluated=seen))) is fires


@pytest.mark.parametrize("others", [(0.4, 0.3), (0.0, 0.3), (0.3, 0.0), (0.0, 0.0)])
def test_bn211_needs_padding_that_passes_through_the_network(others):
    """Dead activations of a network that diverges look like padding at one layer."""
    shares = (others[0], 0.4, others[1])
    layers = [
        layer(name=f"{place}", position=place, evaluated=evaluated(padding_share=share))
        for place, share in enumerate(shares)
    ]
    spread = [
        dataclasses.replace(each, evaluated=dataclasses.replace(each.evaluated, padding_spread=0.2))
        for each in layers
    ]
    history = History(layers=tuple(spread), run=spread[0].run)
    accused = {f.layer for f in run_rules(history, [rule_named("BN211")]).findings}
    assert ("1" in accused) is any(others)


def test_bn403_finds_a_negative_variance_and_a_large_gain():
    negative = layer(running=running(var=-1.0))
    assert [f.severity for f in found("BN403", negative)] == [Severity.ERROR]
    gain = layer(running=running(var=0.0), gamma=np.array([1.0, 1.0, 50.0, 1.0]))
    (finding,) = found("BN403", gain)
    assert finding.channels == (2,)


def test_bn403_knows_small_scales_that_gamma_makes_up_for_and_bounded_activations():
    dead = layer(running=running(var=1e-12), gamma=np.full(4, 5.0))
    assert [f.severity for f in found("BN403", dead)] == [Severity.WARNING]
    assert found("BN403", dataclasses.replace(dead, bounded_by="ReLU6")) == []
    # As in a published MobileNetV2: a gain of 1,902, and outputs that vary by 0.43.
    alive = layer(running=running(var=5e-8), gamma=np.full(4, 6.03))
    assert found("BN403", alive) == []


@pytest.mark.parametrize(
    ("bounded_by", "severity"), [(None, Severity.WARNING), ("ReLU6", Severity.INFO)]
)
def test_bn403_does_not_say_that_a_bounded_value_drowns_others(bounded_by, severity):
    seen = evaluated(largest_normalised_std=500.0)
    (finding,) = found("BN403", layer(evaluated=seen, bounded_by=bounded_by))
    assert finding.severity is severity
    assert ("drowns" in finding.message) is (bounded_by is None)


def test_bn403_and_bn204_find_a_bounded_activation_in_a_model():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU6())
    with torch.no_grad():
        model[1].running_var.fill_(1e-12)
        model[1].weight.fill_(5.0)
    findings = {f.code: f for f in bnguard.inspect(model).findings}
    assert "BN403" not in findings
    assert "Conv2d" in findings["BN204"].fix.summary
    model[2] = torch.nn.ReLU()
    assert "BN403" in {f.code for f in bnguard.inspect(model).findings}


@pytest.mark.parametrize(("dead", "severity"), [(14, Severity.INFO), (32, Severity.WARNING)])
def test_bn204_warns_beyond_what_healthy_depthwise_networks_have(dead, severity):
    var = np.where(np.arange(32) < dead, 0.0, 0.01)
    statistics = RunningStatistics(mean=np.zeros(32), var=var, updates=1000)
    (finding,) = found("BN204", layer(channels=32, running=statistics))
    assert finding.severity is severity


def test_bn204_leaves_channels_alone_whose_gamma_makes_up_for_their_scale():
    small = layer(running=running(var=1.5e-7), gamma=np.full(4, 3.29))
    assert found("BN204", small) == []
    assert found("BN204", dataclasses.replace(small, gamma=np.ones(4))) != []


@pytest.mark.parametrize(
    ("fed_by", "advice"),
    [(None, "if an activation"), ("Conv2d", "Conv2d before"), ("ReLU", "put BN before the act")],
)
def test_bn204_advises_by_what_feeds_the_layer(fed_by, advice):
    (finding,) = found("BN204", layer(running=running(var=0.0), fed_by=fed_by))
    assert advice in finding.fix.summary


def test_bn404_looks_at_float16_alone():
    half = evaluated(mean=60_000.0, dtype="float16")
    assert [f.severity for f in found("BN404", layer(evaluated=half))] == [Severity.WARNING]
    infinite = dataclasses.replace(half, nonfinite_batches=2)
    assert [f.severity for f in found("BN404", layer(evaluated=infinite))] == [Severity.ERROR]
    assert not found("BN404", layer(evaluated=dataclasses.replace(half, dtype="bfloat16")))


def test_bn401_names_the_first_layer_in_the_order_of_calls():
    run = Run(steps=10)
    first = layer(name="first", position=0, poisoned_step=7, run=run)
    later = layer(name="later", position=1, poisoned_step=7, run=run)
    earlier_fine = layer(name="fine", position=0, run=run)
    (finding,) = run_rules(History(layers=(later, first), run=run), [rule_named("BN401")]).findings
    assert (finding.layer, finding.step) == ("first", 7)
    (finding,) = run_rules(
        History(layers=(earlier_fine, later), run=run), [rule_named("BN401")]
    ).findings
    assert finding.layer == "later"
    assert "it began after fine" in finding.message


def test_bn401_tells_weights_that_the_bad_batch_ruined_from_those_that_made_it():
    ruined = BadValueOrigin(
        module="conv", kind="Conv2d", channels=(), is_input_bad=False, bad_parameters=("weight",)
    )
    run = Run(steps=10, origin=ruined)
    bad = layer(name="bad", position=1, poisoned_step=7, gamma=np.full(4, np.nan), run=run)

    def found(step):
        before = layer(name="before", position=0, poisoned_step=step, run=run)
        (finding,) = run_rules(
            History(layers=(before, bad), run=run), [rule_named("BN401")]
        ).findings
        return finding

    aftermath = found(8)
    assert "after before, which was finite; the weights are not finite now" in aftermath.message
    assert "conv" not in aftermath.message
    assert found(7).message.endswith("conv (Conv2d) has parameters that are not finite: weight")


def test_bn402_does_not_pass_over_a_network_whose_gamma_is_nan():
    dead = layer(running=running(), gamma=np.full(4, np.nan))
    (finding,) = found("BN402", dead)
    assert finding.severity is Severity.ERROR
    assert "go back to a checkpoint" in finding.fix.summary
    (restored,) = found("BN402", dataclasses.replace(dead, restored_updates=3))
    assert restored.severity is Severity.ERROR
    assert "restored" in restored.message


@pytest.mark.parametrize(("seen", "fires"), [(10, True), (100, False)])
def test_bn303_believes_no_counter_that_was_set_back(seen, fires):
    start = RunningStatistics(mean=np.zeros(4), var=np.ones(4), updates=0)
    now = running(mean=0.5, var=0.9, updates=10)
    subject = layer(
        running_at_start=start, running=now, updates_seen=seen, calls=Calls(in_training=seen)
    )
    assert bool(found("BN303", subject)) is fires


def test_bn303_believes_no_counter_that_a_variance_contradicts():
    few = layer(running=running(var=0.01, updates=5), run=Run())
    assert not found("BN303", few)
    assert found("BN303", layer(running=running(var=0.9, updates=5), run=Run()))


def test_a_healthy_layer_is_accused_of_nothing():
    healthy = layer(
        evaluated=evaluated(), run=Run(steps=100, mode_gap=GAP), statistics_dtype="float32"
    )
    assert run_rules(History(layers=(healthy,), run=healthy.run), RULES).findings == ()


def test_channels_that_a_large_eps_damps_are_not_dead():
    damped = layer(eps=1.0, running=running(var=0.05))
    assert found("BN204", damped) == []
    (finding,) = found("BN204", layer(running=running(var=1e-7)))
    assert "4 of 4 channels" in finding.message
    assert "at most 1e-07" in finding.message


def test_statistics_of_a_layer_that_is_never_called_are_not_awaited():
    unused = layer(running=running(updates=0), updates_seen=0, position=None)
    assert found("BN303", unused) == []
    assert found("BN303", dataclasses.replace(unused, position=0)) != []
    assert found("BN303", dataclasses.replace(unused, run=Run())) != []
