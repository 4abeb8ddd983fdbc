"""Each rule fires on its fault and is silent on the twin that differs in that one thing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnguard
from bnguard.findings import Severity
from tests.networks import conv_net, digits, mlp, train


def watched(model, **options):
    return bnguard.watch(model, on_findings=lambda group: None, **options)


def codes(report, at_least=Severity.WARNING):
    return {finding.code for finding in report.findings if finding.severity >= at_least}


def fine_tuned(freeze):
    """Train the head of a network whose layers were treated by ``freeze``."""
    model = conv_net()
    freeze(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    images, labels = digits()
    monitor = watched(model, optimizer=optimizer)
    for batch in torch.arange(640).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        monitor.step()
    return monitor.report()


def without_gradient(model):
    for parameter in model[:-1].parameters():
        parameter.requires_grad = False


def in_eval_mode(model):
    without_gradient(model)
    model[:-1].eval()


def test_bn101_fires_on_a_backbone_frozen_by_requires_grad_alone():
    report = fine_tuned(without_gradient)
    assert "BN101" in codes(report)
    (finding, *rest) = [f for f in report.findings if f.code == "BN101"]
    assert len(rest) == 2
    assert finding.evidence.value == 20
    assert "σ" in finding.message


def test_bn101_is_told_of_a_model_before_it_trains():
    model = conv_net()
    assert "BN101" not in codes(bnguard.inspect(model), Severity.INFO)
    without_gradient(model)
    (finding, *_) = [f for f in bnguard.inspect(model).findings if f.code == "BN101"]
    assert finding.severity is Severity.INFO
    assert "BN101" not in codes(bnguard.inspect(model.eval()), Severity.INFO)


def test_bn101_is_silent_on_a_backbone_in_eval_mode():
    assert "BN101" not in codes(fine_tuned(in_eval_mode), Severity.INFO)


def test_bn101_fires_where_the_optimizer_was_not_given_the_parameters():
    model = conv_net()
    optimizer = torch.optim.SGD(model[-1].parameters(), lr=0.05)
    monitor = watched(model, optimizer=optimizer)
    for _ in range(3):
        model(torch.randn(8, 1, 8, 8)).sum().backward()
        optimizer.step()
        monitor.step()
    assert "BN101" in codes(monitor.report())


def test_bn101_is_silent_where_another_optimizer_moves_them():
    model = conv_net()
    known = torch.optim.SGD(model[-1].parameters(), lr=0.05)
    unknown = torch.optim.SGD(model[:-1].parameters(), lr=0.05)
    monitor = watched(model, optimizer=known)
    for _ in range(3):
        F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8)).backward()
        known.step()
        unknown.step()
        monitor.step()
    assert "BN101" not in codes(monitor.report(), Severity.INFO)


def test_bn101_is_info_on_a_teacher_kept_in_train_mode():
    teacher = conv_net().requires_grad_(False)
    monitor = watched(teacher)
    for _ in range(5):
        with torch.no_grad():
            teacher(torch.randn(8, 1, 8, 8))
        monitor.step()
    findings = [f for f in monitor.report().findings if f.code == "BN101"]
    assert [finding.severity for finding in findings] == [Severity.INFO] * 3


def test_bn102_names_the_layer_before_torch_refuses_the_batch():
    told = []
    model = mlp()
    with bnguard.watch(model, on_findings=told.append) as monitor:
        for _ in range(2):
            model(torch.randn(8, 64))
            monitor.step()
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            model(torch.randn(1, 64))
    assert [(group.worst.code, group.where, group.worst.step) for group in told] == [
        ("BN102", "layer 1", 3)
    ]
    assert codes(monitor.report(), Severity.ERROR) == {"BN102"}


def test_bn102_is_silent_on_one_sample_with_positions_and_in_eval_mode():
    model = conv_net()
    with watched(model) as monitor:
        model(torch.randn(1, 1, 8, 8))
        monitor.step()
        model.eval()
        model(torch.randn(1, 1, 8, 8))
    assert "BN102" not in codes(monitor.report(), Severity.INFO)


def test_bn201_fires_on_two_values_per_channel():
    model = mlp()
    with watched(model) as monitor:
        train(model, monitor, batch_size=2, epochs=1, flat=True)
    findings = [f for f in monitor.report().findings if f.code == "BN201"]
    assert [finding.evidence.value for finding in findings] == [2, 2]


def one_image_a_batch(noise):
    """Batches of nearly equal images, another one each step."""
    layer = nn.Sequential(nn.BatchNorm2d(3))
    with watched(layer) as monitor:
        for _ in range(30):
            layer(torch.randn(1, 3, 1, 1) + noise * torch.randn(8, 3, 4, 4))
            monitor.step()
    return monitor.report()


def test_bn201_fires_where_the_variance_lies_between_batches():
    report = one_image_a_batch(noise=0.1)
    finding, grouped = report.findings
    assert (finding.code, finding.cause) == ("BN201", None)
    assert finding.evidence.value < 0.05
    assert (grouped.code, grouped.severity) == ("BN203", Severity.INFO)


def test_bn201_is_silent_where_the_variance_lies_within_them():
    assert "BN201" not in codes(one_image_a_batch(noise=2.0), Severity.INFO)


def test_bn301_fires_when_evaluation_data_differ():
    images, _ = digits()
    model = conv_net()
    with watched(model) as monitor:
        train(model, monitor)
        with torch.no_grad(), monitor.evaluation():
            model(3 * images[1200:] + 1)
    findings = [f for f in monitor.report().findings if f.code == "BN301"]
    assert findings
    assert {finding.severity for finding in findings} == {Severity.WARNING}
    assert findings[0].channels
    assert findings[0].evidence.value > findings[0].evidence.limit


def test_bn301_waits_while_the_initial_statistics_fade():
    model = conv_net(momentum=0.01)
    monitor = watched(model)
    train(model, monitor, epochs=1)
    assert "BN301" not in codes(monitor.report(final=False))
    reasons = [skip.reason for skip in monitor.report(final=False).skipped if skip.code == "BN301"]
    assert all("of the initial statistics was left" in reason for reason in reasons)


def test_bn303_fires_on_a_small_momentum_in_a_short_run():
    model = conv_net(momentum=0.01)
    with watched(model) as monitor:
        train(model, monitor)
    report = monitor.report()
    findings = [f for f in report.findings if f.code == "BN303"]
    assert len(findings) == 3
    assert findings[0].evidence.value == pytest.approx(100 * 0.99**57)


def test_bn303_is_told_ahead_where_the_length_of_training_is_known():
    told = []
    model = conv_net(momentum=0.01)
    monitor = bnguard.watch(model, planned_steps=57, every_n_steps=5, on_findings=told.append)
    for _ in range(5):
        model(torch.randn(8, 1, 8, 8))
        monitor.step()
    assert [(group.worst.code, group.worst.step) for group in told] == [("BN303", 1)]


def test_bn303_is_silent_with_a_plain_average_and_on_loaded_statistics():
    averaged = conv_net(momentum=None)
    with watched(averaged) as monitor:
        train(averaged, monitor, epochs=1)
    assert "BN303" not in codes(monitor.report(), Severity.INFO)

    loaded = nn.BatchNorm1d(2)
    loaded.running_mean.fill_(0.5)
    assert "BN303" not in codes(watched(loaded).report(), Severity.INFO)


def test_bn402_names_layer_and_step():
    model = conv_net()
    images, _ = digits()
    told = []
    with bnguard.watch(model, every_n_steps=1, on_findings=told.append) as monitor:
        for step in range(1, 11):
            batch = images[32 * step : 32 * (step + 1)].clone()
            if step == 6:
                batch[0, 0, 0, 0] = torch.nan
            model(batch)
            monitor.step()
    (finding, *_) = [f for f in monitor.report().findings if f.code == "BN402"]
    assert (finding.code, finding.severity, finding.layer, finding.step) == (
        "BN402",
        Severity.ERROR,
        "1",
        6,
    )
    assert told[0].worst.step == 6


def test_bn402_is_silent_on_finite_statistics():
    model = conv_net()
    with watched(model) as monitor:
        model(torch.randn(8, 1, 8, 8))
        monitor.step()
    assert "BN402" not in codes(monitor.report(), Severity.INFO)


def head_only(model, **options):
    """Train with an optimizer of the last layer alone, and return the report."""
    images, labels = digits()
    optimizer = torch.optim.SGD(model[-1].parameters(), lr=0.05)
    monitor = watched(model, **{"optimizer": optimizer, **options})
    for batch in torch.arange(320).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        monitor.step()
    return monitor.report()


def test_bn101_says_that_no_optimizer_holds_a_layer():
    (finding, *_) = head_only(conv_net()).findings
    assert finding.code == "BN101"
    assert finding.message.startswith("no optimizer holds gamma and beta, so they do not change")


def test_bn101_says_that_the_optimizer_holds_nothing_of_the_model():
    model = conv_net()
    outdated = torch.optim.SGD([p.clone().detach() for p in model.parameters()], lr=0.05)
    report = head_only(model, optimizer=outdated)
    (finding, *_) = report.findings
    assert "the optimizer holds none of this model's parameters" in finding.message
    assert "model.parameters()" in finding.fix.summary
    assert "optimizer" not in " ".join(report.notes)


def test_the_optimizer_of_another_model_accuses_none_that_learns():
    model = conv_net()
    monitor = watched(model, optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    train(model, monitor)
    report = monitor.report()
    assert "BN101" not in codes(report, Severity.INFO)
    assert report.notes == ("the optimizer given holds none of this model's parameters",)


def evaluated_outside(in_eval_mode, estimates=False):
    """Evaluate after each 8 steps, in the loop's own way; ``in_eval_mode`` tells in which mode."""
    model, (images, labels) = conv_net(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = watched(model, optimizer=optimizer)
    for step, batch in enumerate(torch.randperm(1200)[:1024].split(32), 1):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        monitor.step()
        if step % 8 == 0:
            with torch.no_grad():
                if estimates:
                    model(images[:600])
                    model(images[600:1200])
                model.train(not in_eval_mode(step))
                for part in images[1200:].split(200):
                    model(part)
            model.train()
    return monitor.report()


def test_bn206_names_an_evaluation_without_eval_that_no_monitor_was_told_of():
    report = evaluated_outside(lambda step: step != 16)
    finding = next(f for f in report.findings if f.code == "BN206")
    assert finding.severity is Severity.WARNING
    assert finding.evidence.value == 3
    assert "before 1 of 32 steps" in finding.message
    assert "model.eval() before evaluation" in finding.fix.summary


@pytest.mark.parametrize("estimates", [False, True])
def test_bn206_accuses_no_evaluation_in_eval_mode(estimates):
    report = evaluated_outside(lambda step: True, estimates=estimates)
    assert "BN206" not in codes(report)


def test_bn206_is_said_where_evaluation_was_judged_by_nothing():
    model, (images, _) = conv_net(), digits()
    monitor = watched(model)
    for batch in images[:320].split(32):
        model(batch)
        monitor.step()
    with torch.no_grad(), monitor.evaluation():
        model(images[1200:])
    report = monitor.report()
    assert "BN206" in codes(report)
    assert any("evaluation ran in train mode" in note for note in report.notes)


@pytest.mark.parametrize("is_updated", [False, True])
def test_an_averaged_copy_in_eval_mode_is_not_accused_of_being_trained_in_it(is_updated):
    model, (images, labels) = conv_net(), digits()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = watched(averaged)
    for batch in torch.randperm(1200).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        averaged.update_parameters(model)
        monitor.step()
    if is_updated:
        torch.optim.swa_utils.update_bn(images[:1200].split(100), averaged)
    with torch.no_grad(), monitor.evaluation():
        averaged(images[1200:])
    report = monitor.report()
    assert "BN209" not in codes(report, Severity.INFO)
    assert not (is_updated and codes(report))


@pytest.mark.parametrize("steps_before", [1, 60])
def test_bn209_is_no_choice_if_the_statistics_are_those_of_a_network_just_built(steps_before):
    """As with a validation after the first step, or an image that a generator draws then."""
    model, (images, labels) = conv_net(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    batches = [torch.randperm(1200)[:32] for _ in range(steps_before + 20)]
    for step, batch in enumerate(batches):
        if step == steps_before:
            model.eval()
            monitor = watched(model, optimizer=optimizer)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    report = monitor.report()
    found = [finding for finding in report.findings if finding.code == "BN209"]
    assert {f.severity for f in found} == {Severity.WARNING if steps_before == 1 else Severity.INFO}
    assert report.findings[0].code == "BN209"
    if steps_before == 1:
        assert "90% of them are still the initial mean 0 and variance 1" in found[0].message
        assert all(f.cause == "BN209" for f in report.findings if f.code == "BN303")
