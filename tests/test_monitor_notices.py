"""A loop that only calls ``watch`` is read as one that reports its steps and evaluations."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bnguard
from tests.networks import conv_net, digits, mlp

IMAGES, LABELS = digits()


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def watched(model, optimizer, **options):
    return bnguard.watch(model, optimizer=optimizer, strict=True, **options)


def backward(model, number, size=32):
    batch = slice(size * number, size * (number + 1))
    F.cross_entropy(model(IMAGES[batch]), LABELS[batch]).backward()


def test_steps_are_those_of_the_optimizer():
    model = conv_net()
    optimizer = sgd(model)
    monitor = watched(model, optimizer)
    for number in range(10):
        optimizer.zero_grad()
        backward(model, number)
        optimizer.step()
    report = monitor.report()
    assert report.history.run.steps == 10
    assert report.layers[0].calls.in_training == report.layers[0].updates_seen == 10


def test_an_explicit_loop_and_a_silent_one_say_the_same():
    def reported(is_explicit):
        torch.manual_seed(0)
        model = conv_net()
        optimizer = sgd(model)
        monitor = watched(model, optimizer, every_n_steps=10)
        for _ in range(2):
            model.train()
            for number in range(30):
                optimizer.zero_grad()
                backward(model, number)
                optimizer.step()
                if is_explicit:
                    monitor.step()
            model.eval()
            with torch.no_grad():
                if is_explicit:
                    with monitor.evaluation():
                        model(IMAGES[1200:])
                else:
                    model(IMAGES[1200:])
        return monitor.report()

    explicit, silent = reported(True), reported(False)
    assert silent.to_dict() == explicit.to_dict()
    assert silent.history.run.mode_gap == explicit.history.run.mode_gap is not None


def test_a_loop_that_also_reports_its_steps_counts_none_twice():
    model = conv_net()
    optimizer = sgd(model)
    monitor = watched(model, optimizer)
    for number in range(6):
        optimizer.zero_grad()
        backward(model, number)
        optimizer.step()
        if number > 2:
            monitor.step()
    assert monitor.report().history.run.steps == 6


def test_accumulated_batches_are_one_step():
    model = conv_net()
    optimizer = sgd(model)
    monitor = watched(model, optimizer)
    for number in range(12):
        backward(model, number, size=4)
        if number % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    report = monitor.report()
    assert report.history.run.steps == 3
    assert "BN107" in {finding.code for finding in report.findings}


def test_a_step_that_a_gradient_scaler_skips_is_one_all_the_same():
    model = conv_net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    monitor = watched(model, optimizer, on_findings=lambda group: None)
    for number in range(8):
        optimizer.zero_grad()
        inputs = IMAGES[32 * number : 32 * (number + 1)].clone()
        if number == 3:
            inputs[0] = torch.nan
        loss = F.cross_entropy(model(inputs), LABELS[32 * number : 32 * (number + 1)])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    report = monitor.report()
    assert report.history.run.steps == 8
    assert {f.step for f in report.findings if f.code == "BN402"} == {4}


def test_each_evaluation_of_a_closure_is_a_step():
    model = conv_net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)
    monitor = watched(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(model(IMAGES[:6]), LABELS[:6])
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
    report = monitor.report()
    layer = report.layers[0]
    assert report.history.run.steps == layer.calls.in_training > 3
    assert "BN107" not in {finding.code for finding in report.findings}


def test_two_optimizers_share_a_step():
    body, head = mlp(), nn.Linear(10, 10)
    model = nn.Sequential(body, head)
    optimizers = [sgd(body), sgd(head)]
    monitor = watched(model, optimizers)
    for number in range(5):
        batch = slice(32 * number, 32 * (number + 1))
        F.cross_entropy(model(IMAGES[batch].flatten(1)), LABELS[batch]).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.report().history.run.steps == 5


def test_critic_and_generator_share_a_step():
    critic = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    generator = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 64))
    of_critic, of_generator = sgd(critic, 1e-3), sgd(generator, 1e-3)
    monitors = [watched(critic, of_critic), watched(generator, of_generator)]
    for number in range(6):
        real, noise = IMAGES[32 * number : 32 * (number + 1)].flatten(1), torch.randn(32, 8)
        of_critic.zero_grad()
        critic(real).mean().backward()
        critic(generator(noise).detach()).mean().backward()
        of_critic.step()
        of_generator.zero_grad()
        critic(generator(noise)).mean().backward()
        of_generator.step()
    assert [monitor.report().history.run.steps for monitor in monitors] == [6, 6]


def test_forwards_in_train_mode_without_gradients_are_no_evaluation():
    model = conv_net()
    optimizer = sgd(model)
    monitor = watched(model, optimizer, on_findings=lambda group: None)
    for number in range(20):
        optimizer.zero_grad()
        backward(model, number)
        optimizer.step()
        if number % 5 == 4:
            with torch.no_grad():
                for part in IMAGES[1200:1328].split(32):
                    model(part)
    report = monitor.report()
    assert all(layer.evaluated is None for layer in report.layers)
    assert "BN206" in {finding.code for finding in report.findings}


def test_a_backbone_without_gradients_is_no_evaluation():
    backbone, head = mlp(), nn.Linear(10, 10)
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    optimizer = sgd(head)
    monitor = watched(model, optimizer)
    backbone.eval()
    for number in range(10):
        batch = slice(32 * number, 32 * (number + 1))
        with torch.no_grad():
            features = backbone(IMAGES[batch].flatten(1))
        F.cross_entropy(head(features), LABELS[batch]).backward()
        optimizer.step()
    assert all(layer.evaluated is None for layer in monitor.report().layers)


def in_place(model, other):
    model.load_state_dict(other)


def through_data(model, other):
    for name, parameter in model.named_parameters():
        parameter.data = other[name].clone()
    for name, buffer in model.named_buffers():
        buffer.copy_(other[name])


@pytest.mark.parametrize("exchange", [in_place, through_data])
def test_an_evaluation_with_exchanged_weights_is_read_without_a_mode_gap(exchange):
    model, other = conv_net(), conv_net()
    optimizer = sgd(model)
    monitor = watched(model, optimizer)
    for number in range(5):
        optimizer.zero_grad()
        backward(model, number)
        optimizer.step()
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    exchange(model, other.state_dict())
    with torch.no_grad():
        model.eval()(IMAGES[1200:])
    exchange(model, trained)
    report = monitor.report()
    assert all(layer.evaluated.count for layer in report.layers)
    assert all((layer.evaluated.running.mean == 0.0).all() for layer in report.layers)
    assert report.history.run.has_new_weights_in_evaluation
    assert report.history.run.mode_gap is None
    assert "exchanged" in report.history.run.mode_gap_reason


def test_averaged_weights_do_not_hide_the_evaluation_before_them():
    model, average = conv_net(), conv_net()
    optimizer = sgd(model)
    monitor = watched(model, optimizer)
    backward(model, 0)
    optimizer.step()
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model.eval()(IMAGES[1200:])
        in_place(model, average.state_dict())
        assert monitor.report().history.run.has_new_weights_in_evaluation is False
        model(IMAGES[1200:])
    in_place(model, trained)
    assert monitor.report().history.run.has_new_weights_in_evaluation is True


def test_an_evaluation_before_new_statistics_is_dropped():
    model = conv_net()
    optimizer = sgd(model)
    monitor = watched(model, optimizer)
    backward(model, 0)
    optimizer.step()
    with torch.no_grad():
        model.eval()(IMAGES[1200:])
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(1.0)
    assert all(layer.evaluated is None for layer in monitor.report().layers)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.running_mean.add_(1.0),
        lambda layer: setattr(layer, "running_var", layer.running_var.clone()),
        lambda layer: layer.weight.add_(1.0),
        lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias.clone())),
    ],
    ids=["mean", "another variance", "gamma", "another beta"],
)
def test_an_evaluation_ends_where_a_layer_changes(change):
    model = conv_net()
    # A lazy layer that is never called has no values to compare.
    model.unused = nn.LazyBatchNorm1d()
    layer = next(module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    optimizer = sgd(model)
    monitor = watched(model, optimizer)
    backward(model, 0)
    optimizer.step()
    with torch.no_grad():
        model.eval()(IMAGES[1200:1300])
        state = monitor._observer.weights.state_now()
        model(IMAGES[1200:1300])
        assert monitor._observer.weights.state_now() == state == monitor._evaluations._state
        change(layer)
        assert monitor._observer.weights.state_now() != state
    assert monitor.report().failure is None


def test_a_loop_that_acts_in_eval_mode_is_read_now_and_then():
    model = conv_net()
    optimizer = sgd(model)
    monitor = watched(model, optimizer)
    for number in range(300):
        model.eval()
        with torch.no_grad():
            model(IMAGES[:8])
        model.train()
        optimizer.zero_grad()
        backward(model, number % 30)
        optimizer.step()
    assert 0 < monitor._evaluations.number < 30
    monitor.report()


def test_watching_leaves_weights_bit_identical():
    def trained(is_watched):
        torch.manual_seed(1)
        model = conv_net()
        optimizer = sgd(model)
        monitor = watched(model, optimizer, every_n_steps=5) if is_watched else None
        for number in range(24):
            model.train()
            optimizer.zero_grad()
            backward(model, number)
            optimizer.step()
            if number % 8 == 7:
                model.eval()
                with torch.no_grad():
                    model(IMAGES[1200:])
        if monitor is not None:
            monitor.report()
            monitor.close()
            assert not any(module._forward_pre_hooks for module in model.modules())
            assert not optimizer._optimizer_step_post_hooks
        return model.state_dict()

    with_monitor, without = trained(True), trained(False)
    assert all(torch.equal(with_monitor[key], without[key]) for key in without)


_SCRIPT = """
import os, sys
import torch, torch._dynamo, bnguard
from torch import nn

def train():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = bnguard.watch(model, optimizer=optimizer)
    for _ in range(7):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return monitor

for number, end in enumerate(sys.argv[1:]):
    process = os.fork()
    if process == 0:
        for handle, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT), handle)
        exec(end)
        break
    os.waitpid(process, 0)
"""


def test_the_report_is_printed_at_exit_unless_it_was_asked_for(tmp_path):
    endings = {
        "kept = train()": 1,
        "import gc\ntrain()\ngc.collect()": 1,
        "monitor = train()\nmonitor.report()": 0,
        "train()\nraise SystemExit(3)": 1,
    }
    # Each ends as a process of its own does, of one that has imported what takes seconds.
    script = tmp_path / "script.py"
    script.write_text(_SCRIPT)
    run = [sys.executable, script, *endings]
    subprocess.run(run, cwd=tmp_path, check=True, timeout=120)
    for number, (end, reports) in enumerate(endings.items()):
        assert (tmp_path / f"{number}.out").read_text() == ""
        printed = (tmp_path / f"{number}.err").read_text()
        assert printed.count("1 BN layer · 7 steps") == reports, f"{end}\n{printed}"


def test_what_a_loop_writes_after_each_step_is_part_of_it():
    student, teacher = mlp(), mlp()
    model = nn.ModuleDict({"student": student, "teacher": teacher})
    optimizer = sgd(student)
    monitor = watched(model, optimizer)
    for _ in range(2):
        student.train()
        for number in range(10):
            optimizer.zero_grad()
            backward(lambda images: student(images.flatten(1)), number)
            optimizer.step()
            teacher.load_state_dict(student.state_dict())
        student.eval()
        with torch.no_grad():
            student(IMAGES[1200:].flatten(1))
    assert not monitor.report().history.run.has_new_weights_in_evaluation


def test_weights_written_for_explicit_evaluations_are_no_part_of_training():
    """As where a network is pruned, evaluated, and trained on, again and again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with bnguard.watch(model, optimizer=optimizer, strict=True) as monitor:
        for _ in range(3):
            for _ in range(10):
                optimizer.zero_grad()
                model.train()(torch.randn(16, 4)).square().mean().backward()
                optimizer.step()
                monitor.step()
            with torch.no_grad(), monitor.evaluation():
                model[0].weight.mul_(0.5)
                model.eval()(torch.randn(64, 4))
        assert monitor.report().history.run.has_new_weights_in_evaluation
