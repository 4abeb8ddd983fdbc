"""A drift is told with its cause, the numbers that speak for it, and the fix that belongs to it."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

import bnguard
from bnguard.findings import Severity
from bnguard.observe.history import (
    BatchWindow,
    History,
    LayerHistory,
    ModeGap,
    Run,
    RunningStatistics,
)
from bnguard.observe.windows import EvalWindow
from bnguard.rules import rule_named
from bnguard.rules.engine import run_rules
from tests.networks import digits
from tests.zoo.architectures import build
from tests.zoo.faults import (
    averaged_weights,
    lagging_statistics,
    other_preprocessing,
    sorted_by_class,
    too_few_updates,
)
from tests.zoo.training import EVALUATE, shuffled

SYMPTOMS = [rule_named("BN301"), rule_named("BN302")]
HARM = ModeGap(samples=64, relative_change=2.0, sampling_change=0.1, flipped_share=0.5)
SMALL_HARM = dataclasses.replace(HARM, relative_change=0.5, flipped_share=0.2)


def window(mean=0.0, noise=0.0, batches=20, trend=1.0):
    """A window of training; ``noise`` is the spread of the batch means in σ.

    That from one batch to the next is ``trend`` times smaller.
    """
    between = np.full(4, noise**2 / (1.0 - noise**2))
    return BatchWindow(
        batches=np.full(4, float(batches)),
        mean=np.full(4, mean),
        var_unbiased=np.ones(4),
        var_of_means=between,
        var_of_means_successive=between / trend**2,
        var_max=np.ones(4),
    )


def drifted(name="bn", mean=3.0, position=0, **options):
    """A layer that sees, in eval mode, another mean than its running statistics say."""
    running = RunningStatistics(mean=np.zeros(4), var=np.ones(4), updates=1000)
    seen = EvalWindow(
        count=10_000,
        batches=8,
        mean=np.full(4, mean),
        var_unbiased=np.ones(4),
        running=running,
        step=10,
    )
    return LayerHistory(
        **{
            "name": name,
            "channels": 4,
            "position": position,
            "training": True,
            "updates_seen": 100,
            "samples": 32,
            "running": running,
            "evaluated": seen,
            "run": Run(steps=100, mode_gap=HARM),
            **options,
        }
    )


def symptoms(*layers):
    findings = run_rules(History(layers=layers, run=layers[0].run), SYMPTOMS).findings
    return [f for f in findings if f.code == "BN301"], [f for f in findings if f.code == "BN302"]


@pytest.mark.parametrize(
    ("layer", "reason", "fix", "repair"),
    [
        (
            drifted(window=window(mean=3.0), momentum=0.01),
            "lag behind the weights.*momentum 0.01 averages some 100 updates",
            "larger momentum",
            "recalibrate",
        ),
        (
            drifted(window=window(mean=3.0), momentum=None),
            "lag behind the weights.*a plain average over all updates",
            "larger momentum",
            "recalibrate",
        ),
        # Weights that move within the window: it is only nearer than the running statistics.
        (drifted(window=window(mean=1.5)), "lag behind the weights", "momentum", "recalibrate"),
        (
            drifted(mean=1.1, window=window(mean=1.1, noise=0.7), momentum=0.45, samples=2),
            "averages some 3 batches of 2 samples.*uncertain by 0.38 σ",
            "smaller momentum",
            "recalibrate",
        ),
        (
            drifted(window=window(mean=1.1, noise=0.6, trend=5.0)),
            "weights that move fast.*spread 5 times as much as from one batch to the next",
            "recalibrate before evaluation",
            "recalibrate",
        ),
        (
            drifted(window=window(noise=0.35), samples=8),
            "a batch of 8 samples jumps by 0.35 σ",
            "GroupNorm",
            None,
        ),
        (
            drifted(window=window()),
            "the data differ, or the weights have just moved: .* at the first BN layer already",
            "a training and an evaluation batch",
            None,
        ),
    ],
)
def test_each_cause_has_its_words_numbers_and_fix(layer, reason, fix, repair):
    (drift,), (gap,) = symptoms(layer)
    for finding in (drift, gap):
        assert finding.severity is Severity.WARNING
        assert fix in finding.fix.summary
        assert finding.fix.repair == repair
        assert finding.reasons
        assert re.search(reason, finding.message), finding.message
    assert gap.cause == "BN301"


def test_a_rest_of_the_initial_variance_is_told_as_such_and_not_as_lag():
    """Data of a small scale: after 40 updates 1.5 % of the initial 1 is most of the variance."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16))
    with bnguard.watch(model, every_n_steps=10) as monitor:
        for _ in range(40):
            model(0.05 * torch.randn(32, 8))
            monitor.step()
        model.eval()
        with monitor.evaluation():
            for _ in range(8):
                model(0.05 * torch.randn(32, 8))
    (told,) = (found for found in monitor.report().findings if found.code == "BN301")
    assert "because 1.5% of them are still the initial mean 0 and variance 1" in told.message
    assert told.fix.repair == "recalibrate"


def test_a_drift_after_layers_that_agree_lies_between_them():
    first = drifted("first", mean=0.0, window=window())
    (drift,), _ = symptoms(first, drifted("second", position=1, window=window()))
    assert drift.layer == "second"
    assert "something between this and the earlier" in drift.message
    assert "dropout" in drift.fix.summary


@pytest.mark.parametrize(
    ("in_training", "before", "cause", "fix"),
    [
        (None, 0.0, "something between .* or the data differ", "augmentation .*, and .* branches"),
        (0.2, 0.0, "the data differ, as by augmentation", "compare the augmentation"),
        (2.0, 0.0, "something between .* or the data differ", "augmentation .*, and .* branches"),
        (2.0, 0.9, "grows from layer to layer, and .* on training batches too", "recalibrate"),
    ],
)
def test_the_modes_on_training_batches_tell_of_the_data(in_training, before, cause, fix):
    known = None
    if in_training is not None:
        known = dataclasses.replace(HARM, relative_change=in_training, flipped_share=0.02)
    run = Run(steps=100, mode_gap=HARM, mode_gap_in_training=known)
    means = (0.0, before, 1.1)
    layers = [
        drifted(f"{place}", mean=mean, position=place, window=window(), run=run)
        for place, mean in enumerate(means)
    ]
    (drift,), _ = symptoms(*layers)
    assert re.search(cause, drift.message), drift.message
    assert re.search(fix, drift.fix.summary)


@pytest.mark.parametrize(
    ("before", "samples", "cause"),
    [
        (0.9, 4, "batches of 4 samples are small: the drift grows from layer to layer"),
        (0.0, 4, "something between this and the earlier"),
        (0.9, 32, "something between this and the earlier"),
    ],
)
def test_a_drift_that_grows_from_layer_to_layer_is_of_small_batches(before, samples, cause):
    first = drifted("first", mean=0.0, window=window(), samples=samples)
    second = drifted("second", mean=before, position=1, window=window(), samples=samples)
    third = drifted("third", mean=1.1, position=2, window=window(), samples=samples)
    (drift,), (gap,) = symptoms(first, second, third)
    assert drift.layer == "third"
    assert cause in drift.message
    assert cause in gap.message
    assert ("GroupNorm" in drift.fix.summary) is ("small" in cause)


@pytest.mark.parametrize("is_settled", [True, False])
def test_values_far_from_a_mean_that_drifted_are_a_symptom_of_the_drift(is_settled):
    """While training goes on, both may pass; a layer that did not drift has a fault of its own."""
    run = Run(steps=100, mode_gap=HARM, is_settled=is_settled)
    moved, matching = (drifted(mean=mean, window=window(mean), run=run) for mean in (3.0, 0.0))
    for layer in (moved, matching):
        seen = dataclasses.replace(layer.evaluated, largest_normalised_std=500.0)
        far = dataclasses.replace(layer, evaluated=seen)
        findings = run_rules(History(layers=(far,), run=run)).findings
        (value,) = [found for found in findings if found.code == "BN403"]
        may_pass = layer is moved and not is_settled
        assert value.severity is (Severity.INFO if may_pass else Severity.WARNING)
        assert value.cause == ("BN301" if layer is moved and is_settled else None)


def test_small_batches_may_make_a_drift_much_larger_on_its_way():
    means = (0.3, 1.2, 2.4, 4.6)
    layers = [
        drifted(f"{place}", mean=mean, position=place, samples=2, window=window(trend=1.0))
        for place, mean in enumerate(means)
    ]
    layers[1] = dataclasses.replace(layers[1], window=window(mean=1.2, trend=5.0))
    drifts, _ = symptoms(*layers)
    causes = {drift.layer: "batches of 2 samples are small" in drift.message for drift in drifts}
    assert causes == {"1": False, "2": False, "3": True}
    assert "lag behind the weights" in next(f.message for f in drifts if f.layer == "2")


@pytest.mark.parametrize("count", [2, 20, 0])
def test_a_last_batch_of_one_sample_is_told(count):
    """A network that trains on single samples has another fault."""
    first = drifted("first", mean=0.0, window=window())
    counts = {32 * 64: 80, 64: count} if count else {32 * 64: 80}
    for newest in (window(), window(mean=3.0)):
        options = {"window": newest, "values_per_channel": counts, "momentum": 0.1}
        (drift,), _ = symptoms(first, drifted("second", position=1, **options))
        assert ("2 batches of 82 held a single sample" in drift.message) is (count == 2)
        assert ("drop_last=True" in drift.fix.summary) is (count == 2)


def test_a_larger_momentum_is_no_fix_for_small_batches():
    (drift,), _ = symptoms(drifted(window=window(mean=3.0), samples=2))
    assert "lag behind the weights" in drift.message
    assert "larger batches" in drift.fix.summary
    assert "momentum" not in drift.fix.summary


@pytest.mark.parametrize("noise", [0.4, 0.1, np.nan])
def test_small_batches_are_told_where_they_enter(noise):
    """What the first layer normalises away in training reaches the second in eval mode."""
    first = drifted("first", mean=0.0, window=window(noise=noise), samples=2)
    second = drifted("second", position=1, window=window(), samples=2)
    (drift,), _ = symptoms(first, second)
    said = "a batch of 2 samples jumps by 0.4 σ at first" in drift.message
    assert said is (noise == 0.4)


def test_newest_batches_that_are_no_nearer_tell_of_no_lag():
    first = drifted("first", mean=0.0, window=window())
    (drift,), _ = symptoms(first, drifted("second", mean=1.1, position=1, window=window(mean=0.2)))
    assert "lag behind" not in drift.message


def test_what_goes_wrong_at_one_layer_is_told_of_those_after_it():
    layers = [drifted(f"{place}", position=place, window=window(mean=3.0)) for place in range(3)]
    drifts, _ = symptoms(*layers)
    assert [drift.layer for drift in drifts] == ["0", "1", "2"]
    assert "begins at" not in drifts[0].message
    assert all("begins at 0, because they lag" in drift.message for drift in drifts[1:])


def test_without_batches_of_training_nothing_is_guessed():
    (drift,), (gap,) = symptoms(drifted())
    assert "because" not in drift.message
    assert "because of BN301" in gap.message
    assert drift.fix.repair == gap.fix.repair == "recalibrate"


@pytest.mark.parametrize(
    ("in_training", "severity"),
    [
        ({"relative_change": 0.2, "flipped_share": 0.02}, Severity.INFO),
        ({}, Severity.WARNING),
        ({"relative_change": 0.2, "samples": 8}, Severity.WARNING),
        (None, Severity.WARNING),
    ],
)
def test_a_gap_is_info_if_the_modes_agree_on_training_batches(in_training, severity):
    """The running statistics are right then, and the data of the evaluation differ."""
    known = None if in_training is None else dataclasses.replace(HARM, **in_training)
    run = Run(steps=100, mode_gap=HARM, mode_gap_in_training=known)
    _, (found,) = symptoms(drifted(mean=0.6, window=window(mean=0.0), run=run))
    assert found.severity is severity
    assert ("the modes agree on training batches" in found.message) == (severity is Severity.INFO)


@pytest.mark.parametrize(
    ("momentum", "is_settled", "codes"),
    [(0.1, True, []), (0.0001, True, ["BN303", "BN302"]), (0.0001, False, [])],
)
def test_a_gap_may_be_smaller_at_the_end_if_its_cause_is_known(momentum, is_settled, codes):
    gap = dataclasses.replace(SMALL_HARM, flipped_share=0.08)
    run = Run(steps=100, mode_gap=gap, is_settled=is_settled)
    layer = drifted(mean=0.6, momentum=momentum, window=window(), run=run)
    findings = run_rules(History(layers=(layer,), run=run)).findings
    assert [f.code for f in findings if f.severity > Severity.INFO] == codes


def watched(fault, architecture="mlp"):
    return fault.FAULT.watched(is_faulty=True, architecture=architecture, seed=3).report


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (too_few_updates, "BN303"),
        (other_preprocessing, "BN305"),
        (averaged_weights, "BN304"),
        (sorted_by_class, "BN203"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_cause_that_a_rule_names_comes_first_and_lends_its_numbers_and_fix(fault, code):
    findings = watched(fault).findings
    root = findings[0]
    assert (root.code, root.cause) == (code, None)
    told = [f for f in findings if f.code in ("BN301", "BN302") and f.severity > Severity.INFO]
    for symptom in told:
        assert f"because of {code}" in symptom.message
        assert symptom.fix == root.fix
        assert symptom.reasons
    assert told or code == "BN203"


def test_a_lag_is_told_in_a_real_run():
    report = watched(lagging_statistics)
    assert report.findings[0].code == "BN301"
    assert all("lag behind the weights" in f.message for f in report.findings)


def sorted_batches(size):
    images, labels = (values[EVALUATE] for values in digits())
    return images[labels.argsort(stable=True)].split(size)


@pytest.mark.parametrize("size", [2, 8, 32, 128])
@pytest.mark.parametrize("architecture", ["mlp", "conv", "sequence"])
def test_a_sorted_evaluation_accuses_nobody(architecture, size):
    batches = sorted_batches(size)
    report = trained(architecture, batches)
    assert [str(f) for f in report.findings if f.severity > Severity.INFO] == []


def trained(architecture, batches, momentum=0.1, prepare=lambda images: images):
    """Train on shuffled digits, and evaluate on these batches."""
    torch.manual_seed(0)
    model = build(architecture, momentum=momentum)
    told = []
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    with bnguard.watch(model, optimizer=optimizer, on_findings=told.append) as monitor:
        for _ in range(3):
            model.train()
            for batch in shuffled(labels[:1200]).split(32)[:-1]:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                monitor.step()
            model.eval()
            with torch.no_grad(), monitor.evaluation():
                for part in batches:
                    model(prepare(part))
    assert told == [] or momentum != 0.1 or prepare(images) is not images
    return monitor.report()


def test_a_large_drift_is_told_also_where_evaluation_is_sorted():
    report = trained("mlp", sorted_batches(32), prepare=lambda images: 3.0 * images + 1.0)
    assert "BN305" in {f.code for f in report.findings if f.severity > Severity.INFO}


def test_what_is_sorted_is_told_as_such():
    spread = dataclasses.replace(
        drifted().evaluated, between_share=0.6, var_between=np.full(4, 4.0)
    )
    (drift,), (gap,) = symptoms(drifted(evaluated=spread, window=window()))
    for finding in (drift, gap):
        assert finding.severity is Severity.INFO
        assert "do not represent the rest: 60%" in finding.message
        assert "shuffle the evaluation data" in finding.fix.summary


@pytest.mark.parametrize("noise", [0.5, 0.1])
def test_pairs_that_may_be_sorted_are_no_excuse_for_batches_of_pairs(noise):
    """With so few samples, a certain cause outweighs the doubt."""
    seen = dataclasses.replace(
        drifted(mean=1.5).evaluated,
        between_share=0.4,
        is_between_shown=False,
        var_between=np.full(4, 0.4),
    )
    layer = drifted(evaluated=seen, window=window(noise=noise), samples=2)
    (drift,), (gap,) = symptoms(layer)
    for finding in (drift, gap):
        said = "may not represent the rest" in finding.message
        assert said is (noise == 0.1), finding.message
        assert finding.severity is (Severity.INFO if said else Severity.WARNING)


@pytest.mark.parametrize(
    ("noise", "trend", "is_accused"), [(0.4, 1.0, True), (0.1, 1.6, True), (0.4, 1.6, False)]
)
def test_data_are_not_accused_of_a_distance_that_moving_weights_may_make(noise, trend, is_accused):
    layer = drifted(mean=1.5, window=window(noise=noise, trend=trend))
    found = run_rules(History(layers=(layer,), run=layer.run), [rule_named("BN305")]).findings
    assert bool(found) is is_accused


def test_dropout_before_the_first_layer_is_told_as_such_and_accuses_no_data():
    torch.manual_seed(0)
    images, labels = digits()
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(64, 64),
        torch.nn.ReLU(),
        torch.nn.Dropout(0.8),
        torch.nn.Linear(64, 64, bias=False),
        torch.nn.BatchNorm1d(64),
        torch.nn.ReLU(),
        torch.nn.Linear(64, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    told = []
    with bnguard.watch(model, optimizer=optimizer, on_findings=told.append) as monitor:
        for step in range(1, 121):
            batch = torch.randint(1200, (64,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            monitor.step()
            if step % 40 == 0:
                model.eval()
                with torch.no_grad(), monitor.evaluation():
                    model(images[EVALUATE])
                model.train()
        findings = monitor.report().findings
    assert "BN305" not in {finding.code for finding in findings}
    assert "BN305" not in {group.worst.code for group in told}
    drift = next(finding for finding in findings if finding.code == "BN301")
    assert "because Dropout before the layer acts" in drift.message


@pytest.mark.parametrize("rate", [0.02, 0.05])
def test_other_data_are_not_laid_on_weights_that_move_as_usual(rate):
    torch.manual_seed(0)
    images, labels = digits()
    model = build("conv")
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    with bnguard.watch(model, optimizer=optimizer) as monitor:
        for batch in torch.randperm(1200).repeat(3).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            monitor.step()
        model.eval()
        with torch.no_grad(), monitor.evaluation():
            model(1.0 - images[EVALUATE])
    report = monitor.report()
    told = [finding for finding in report.findings if finding.code in ("BN301", "BN302")]
    assert told
    assert all("data differ" in finding.message for finding in told)
