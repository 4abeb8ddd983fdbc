"""Watching a real training from the first step to the report."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import bnguard
from bnguard.errors import ConfigurationError
from bnguard.findings import Severity
from bnguard.rules import Rule
from tests.networks import conv_net, digits, mlp, train


def silent(group):
    raise AssertionError(f"a healthy run was accused: {group.worst}")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("build", "flat"), [(conv_net, False), (mlp, True)])
def test_a_healthy_run_is_accused_of_nothing(seed, build, flat):
    torch.manual_seed(seed)
    model = build()
    with bnguard.watch(model, every_n_steps=10, on_findings=silent) as monitor:
        accuracy = train(model, monitor, flat=flat)
    report = monitor.report()
    assert accuracy > 0.85
    assert report.worst_severity in (None, Severity.INFO)
    assert len(report.layers) == len(bnguard.layers.bn_layer.find_layers(model))


def test_the_state_of_a_version_that_kept_more_is_resumed():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    with bnguard.watch(model, strict=True) as monitor:
        model(torch.randn(16, 4))
        monitor.step()
        state = monitor.state_dict()
    state["windows"]["1"] |= {"var_min": torch.ones(8), "last_step": 1}
    resumed = bnguard.watch(model, strict=True)
    resumed.load_state_dict(state)
    (layer,) = resumed.report().layers
    assert layer.window.mean == pytest.approx(state["windows"]["1"]["mean"].numpy())


def poisoned_run(restore):
    """Train with one NaN batch, whose optimizer step the loop skips, as a gradient scaler does."""
    images, labels = digits()
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    monitor = bnguard.watch(
        model, optimizer=optimizer, restore_poisoned=restore, on_findings=lambda group: None
    )
    for step, batch in enumerate(torch.arange(1152).split(64), start=1):
        inputs = images[batch].clone()
        if step == 9:
            inputs[0] = torch.nan
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels[batch])
        if loss.isfinite():
            loss.backward()
            optimizer.step()
        monitor.step()
        if step == 9:
            after = copy.deepcopy(model.state_dict())
    model.eval()
    with torch.no_grad(), monitor.evaluation():
        scores = model(images[1200:])
    return monitor.report(), after, (scores.argmax(1) == labels[1200:]).float().mean().item()


def test_a_nan_batch_ruins_every_evaluation_unless_it_is_undone():
    report, after, _ = poisoned_run(restore=False)
    assert not after["1.running_mean"].isfinite().all()
    assert [f.step for f in report.findings if f.code == "BN402"] == [9, 9, 9]
    assert report.worst_severity is Severity.ERROR


def test_with_restoring_on_the_run_goes_on():
    report, after, accuracy = poisoned_run(restore=True)
    assert all(value.isfinite().all() for value in after.values())
    assert accuracy > 0.8
    restored = [f for f in report.findings if f.code == "BN402"]
    assert [(f.severity, f.step) for f in restored] == [(Severity.WARNING, 9)] * 3


def state_of(model):
    return {
        "hooks": [len(module._forward_pre_hooks) for module in model.modules()],
        "modes": [module.training for module in model.modules()],
        "momenta": [getattr(module, "momentum", None) for module in model.modules()],
        "keys": list(model.state_dict()),
    }


def test_after_close_nothing_is_left_on_the_model():
    model = conv_net()
    before = state_of(model)
    with bnguard.watch(model) as monitor:
        assert state_of(model) != before
        monitor.step()
    assert state_of(model) == before


def test_an_exception_leaves_nothing_on_the_model():
    model = conv_net()
    before = state_of(model)
    with (
        pytest.raises(KeyboardInterrupt),
        bnguard.watch(model) as monitor,
        monitor.evaluation(),
    ):
        raise KeyboardInterrupt
    assert state_of(model) == before


def test_training_is_bit_identical_with_and_without():
    def trained(is_watched):
        torch.manual_seed(1)
        model = conv_net()
        if is_watched:
            with bnguard.watch(model, every_n_steps=5) as monitor:
                train(model, monitor, epochs=1)
        else:
            monitor = bnguard.watch(nn.Sequential(nn.BatchNorm1d(1)))
            train(model, monitor, epochs=1)
        return model.state_dict()

    with_monitor, without = trained(True), trained(False)
    assert all(torch.equal(with_monitor[key], without[key]) for key in without)


def test_a_copy_of_a_watched_model_is_not_watched():
    model = conv_net()
    with bnguard.watch(model) as monitor:
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied(torch.randn(4, 1, 8, 8))
        torch.save(model, io.BytesIO())
        assert monitor.report().layers[0].values_per_channel == {}


def test_a_module_that_holds_its_monitor_can_be_copied_and_saved():
    model = mlp()
    model.monitor = bnguard.watch(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert averaged.module.monitor is model.monitor
    assert pickle.loads(pickle.dumps(model)).monitor is None


def test_a_model_without_bn_is_warned_about_once_and_watched_in_vain():
    model = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="Linear has no BN layers") as caught:
        monitor = bnguard.watch(model)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    monitor.step()
    with monitor.evaluation():
        pass
    assert monitor.report().findings == ()
    assert "0 BN layers" in str(monitor.report())


def test_a_finding_is_logged_once(caplog):
    model = conv_net(momentum=0.01)
    with caplog.at_level(logging.WARNING, "bnguard"):
        monitor = bnguard.watch(model, planned_steps=60, every_n_steps=2)
        for _ in range(8):
            model(torch.randn(4, 1, 8, 8))
            monitor.step()
    (record,) = caplog.records
    expected = "BN303 unconverged-statistics at 3 layers, worst layer 1,"
    assert record.getMessage().startswith(expected)


def test_a_finding_does_not_continue_the_line_of_a_progress_bar(capsys):
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger("bnguard").addHandler(handler)
    model = conv_net(momentum=0.01)
    monitor = bnguard.watch(model, planned_steps=60)
    try:
        for _ in tqdm(range(3), file=sys.stderr, ascii=True, ncols=40):
            model(torch.randn(4, 1, 8, 8))
            monitor.step()
    finally:
        logging.getLogger("bnguard").removeHandler(handler)
    cleared, _, _ = capsys.readouterr().err.partition("BN303 unconverged-statistics")
    assert re.search(r"\r {20,}\r$", cleared)


def test_what_changes_during_evaluation_is_no_batch_of_training():
    model = nn.Sequential(nn.BatchNorm1d(2))
    with bnguard.watch(model) as monitor:
        model(torch.randn(8, 2))
        monitor.step()
        with monitor.evaluation():
            model(torch.randn(8, 2) + 100)  # still in train mode: a missing eval()
        model(torch.randn(8, 2))
        monitor.step()
    (layer,) = monitor.report().layers
    assert layer.updates_seen == 2
    assert layer.evaluated is None


def test_eval_batches_says_how_many_first_calls_are_read():
    model = nn.Sequential(nn.BatchNorm1d(2)).eval()
    # Read are blocks of at least 32 samples, of however many calls.
    values = torch.randn(5, 40, 2)
    with bnguard.watch(model, eval_batches=3) as monitor, monitor.evaluation():
        for part in values:
            model(part)
    (layer,) = monitor.report().layers
    expected = values[:3].reshape(-1, 2).double()
    assert (layer.evaluated.count, layer.evaluated.batches) == (120, 3)
    assert torch.allclose(torch.tensor(layer.evaluated.mean), expected.mean(0))
    assert torch.allclose(torch.tensor(layer.evaluated.var_unbiased), expected.var(0))


class Broken(Rule):
    """A rule of a user's own."""

    code = "X1"
    name = "broken"

    def check(self, layer):
        raise ZeroDivisionError("of their own")


def test_a_rule_that_raises_is_reported_and_stops_nothing():
    model = conv_net()
    with bnguard.watch(model, rules=[*bnguard.RULES, Broken()], every_n_steps=1) as monitor:
        monitor.step()
    reasons = {skip.reason for skip in monitor.report().skipped if skip.code == "X1"}
    assert reasons == {"the rule failed with ZeroDivisionError: of their own"}


def test_the_report_is_strict_json():
    report, _, _ = poisoned_run(restore=False)
    document = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert document["schema"] == 1
    assert [finding["code"] for finding in document["findings"]][:2] == ["BN401", "BN402"]
    assert document["findings"][1]["cause"] == "BN401"
    assert document["findings"][1]["evidence"]["limit"] == 0


def test_the_report_fits_eighty_columns_without_a_terminal():
    report, _, _ = poisoned_run(restore=False)
    text = str(report)
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert "BN402 poisoned-statistics" in text
    assert "3 layers, worst layer 1" in text
    assert "then recalibrate the running statistics" in " ".join(text.split())
    assert "\n           bnguard.recalibrate(model, train_loader)\n" in text


def test_a_loop_that_tells_of_no_step_is_told_so():
    images, _ = digits()
    model = conv_net()
    with bnguard.watch(model) as monitor:
        for batch in images[:1200].split(8):
            model(batch)
        model.eval()
        with torch.no_grad(), monitor.evaluation():
            model(images[1200:])
    report = monitor.report()
    assert "BN304" not in {finding.code for finding in report.findings}
    assert "no training step was noticed: call monitor.step() after each one" in report.notes


@pytest.mark.parametrize("evaluates", [True, False])
def test_it_is_said_where_no_evaluation_was_seen(evaluates):
    images, _ = digits()
    model = conv_net()
    with bnguard.watch(model) as monitor:
        for batch in images[:640].split(64):
            model(batch)
            monitor.step()
        if evaluates:
            model.eval()
            with torch.no_grad(), monitor.evaluation():
                model(images[1200:])
    unseen = "no evaluation (eval mode, no_grad) was seen"
    said = any(unseen in note for note in monitor.report().notes)
    assert said is not evaluates


def test_a_hundred_layers_with_one_cause_are_one_entry():
    model = nn.Sequential(*[nn.BatchNorm1d(4, momentum=0.001) for _ in range(100)])
    with bnguard.watch(model, on_findings=lambda group: None) as monitor:
        model(torch.randn(8, 4))
        monitor.step()
    report = monitor.report()
    assert len(report.findings) == 100
    assert len(report.groups) == 1
    assert len(str(report).splitlines()) < 30


def test_steps_and_evaluations_after_close_do_no_harm():
    model = conv_net()
    monitor = bnguard.watch(model)
    monitor.close()
    monitor.close()
    monitor.step()
    with monitor.evaluation():
        pass
    assert len(monitor.report().layers) == 3


@pytest.mark.parametrize(
    "place",
    [
        "bnguard.observe.batch_statistics.BatchProbe.read",
        "bnguard.observe.layer_calls.values_per_channel",
        "bnguard.observe.eval_statistics.channel_moments",
        "bnguard.observe.observer.Observer.history",
        "bnguard.observe.gap_probe.GapProbe.measure",
    ],
)
def test_an_error_of_our_own_ends_no_training(place, monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise KeyError("ours")

    def run(**options):
        model = conv_net()
        with bnguard.watch(model, every_n_steps=2, **options) as monitor:
            for _ in range(4):
                model(torch.randn(4, 1, 8, 8))
                monitor.step()
            model.eval()
            with monitor.evaluation():
                model(torch.randn(4, 1, 8, 8))
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())
        monitor.forget_changes()
        return monitor.report()

    monkeypatch.setattr(place, fails)
    text = str(run())
    assert "no problems found" not in text
    assert "KeyError: 'ours'" in text
    assert [record.getMessage().count("KeyError: 'ours'") for record in caplog.records] == [1]
    with pytest.raises(KeyError):
        run(strict=True)


def test_what_the_user_raises_passes():
    def stop(group):
        raise StopIteration(group.worst.code)

    model = conv_net(momentum=0.01)
    monitor = bnguard.watch(model, planned_steps=60, on_findings=stop)
    model(torch.randn(4, 1, 8, 8))
    with pytest.raises(StopIteration, match="BN303"):
        monitor.step()
    with pytest.raises(ValueError, match="mine"), monitor.evaluation():
        raise ValueError("mine")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "watch takes a torch.nn.Module, not NoneType"),
        ({"optimizer": mlp().parameters()}, "several of them, not Parameter"),
        ({"optimizer": 3}, "several of them, not int"),
        ({"rules": ["BN301"]}, r"rules takes objects of bnguard.rules.Rule, not 'BN301'"),
    ],
    ids=["no model", "parameters", "a number", "a code"],
)
def test_what_cannot_be_watched_is_answered_in_one_line(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        bnguard.watch(**{"model": mlp(), **arguments})


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_scripted_models_cannot_be_watched():
    with pytest.raises(ConfigurationError, match="TorchScript, whose layers cannot be read"):
        bnguard.watch(torch.jit.script(conv_net()))


def test_the_rules_run_once_a_check(monkeypatch):
    runs = []
    judge = bnguard.Monitor._judge
    monkeypatch.setattr(
        bnguard.Monitor, "_judge", lambda self, **options: runs.append(1) or judge(self, **options)
    )
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    with bnguard.watch(model, every_n_steps=5) as monitor:
        for _ in range(10):
            model(torch.randn(16, 4))
            monitor.step()
        assert monitor.check() is monitor.check()
        assert len(runs) == 3  # the first step, the fifth and the tenth
        model.eval()
        with torch.no_grad(), monitor.evaluation():
            model(torch.randn(64, 4))
        assert monitor.check().history.layers[0].evaluated is not None
    assert len(runs) == 4


def test_a_finding_that_is_over_is_reported_with_its_steps_and_survives_a_resume():
    layer = nn.BatchNorm1d(4)

    def train(monitor, steps):
        for _ in range(steps):
            layer(torch.randn(16, 4))
            monitor.step()

    with bnguard.watch(layer, every_n_steps=10, on_findings=lambda group: None) as monitor:
        layer.momentum = 0.0
        train(monitor, 20)
        layer.momentum = 0.1
        train(monitor, 40)
        report, state = monitor.report(), monitor.state_dict()
    (past,) = report.over
    assert (past.code, past.first_step, past.last_step) == ("BN103", 1, 20)
    assert "BN103 momentum-out-of-range (error) at the model itself" in str(report)
    assert report.to_dict()["over"][0]["last_step"] == 20
    with bnguard.watch(layer, on_findings=lambda group: None) as resumed:
        resumed.load_state_dict(state)
        train(resumed, 1)
        assert resumed.report().over == (past,)


def test_a_finding_dates_from_when_its_value_was_beyond_the_limit_though_only_info():
    layer = nn.BatchNorm1d(4)
    with bnguard.watch(layer, every_n_steps=1000, on_findings=lambda group: None) as monitor:
        for step in range(1, 201):
            layer.train()
            layer(torch.randn(64, 4))
            monitor.step()
            if step % 40 == 0:
                layer.eval()
                with monitor.evaluation():
                    layer(5.0 + torch.randn(64, 4))
        (drift,) = [f for f in monitor.report().findings if f.code == "BN301"]
    assert drift.step == 40


def test_batches_without_gradients_after_the_last_step_are_said_to_come_after_it():
    layer = nn.BatchNorm1d(4)
    with bnguard.watch(layer) as monitor:
        for _ in range(20):
            layer(torch.randn(16, 4)).sum().backward()
            monitor.step()
        with torch.no_grad():
            for _ in range(9):
                layer(torch.randn(16, 4))
        (finding,) = [f for f in monitor.report().findings if f.code == "BN206"]
    assert "9 batches" in finding.message
    assert "all after the last step" in finding.message


def test_the_batches_of_one_step_are_counted_as_one():
    layer = nn.BatchNorm1d(4)
    with bnguard.watch(layer, accumulated_batches=8) as monitor:
        for batch in range(80):
            layer(torch.randn(16, 4))
            monitor.step(1 + batch // 8)
        report = monitor.report()
    assert report.to_dict()["steps"] == 10
    assert report.layers[0].updates_seen == 80
    assert not report.findings


@pytest.mark.parametrize(
    ("shuffle", "of_other", "is_accused"),
    [(False, 0, True), (True, 0, False), (False, 1, False)],
)
def test_the_order_of_the_loader_that_a_loop_draws_from_is_known(shuffle, of_other, is_accused):
    """With batches of a second loader in use it is unknown which one training draws from."""
    labels = torch.arange(4).repeat_interleave(128)
    dataset = torch.utils.data.TensorDataset(torch.randn(512, 8), labels)
    loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=shuffle)
    other = iter(torch.utils.data.DataLoader(dataset, batch_size=64))
    for _ in range(of_other):
        next(other)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = bnguard.watch(model, optimizer=optimizer)
    for inputs, targets in loader:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    del other
    found = [f for f in monitor.report().findings if f.code == "BN203"]
    assert [f.message.partition(":")[0] for f in found] == (
        ["the loader does not shuffle"] if is_accused else []
    )
