"""Where a NaN or Inf first shows, looked for only after the buffers told of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnguard


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.scale = Divide()
        self.tail = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))

    def forward(self, inputs):
        return self.tail(self.scale(self.stem(inputs)))


class Divide(nn.Module):
    divisor = 1.0

    def forward(self, inputs):
        outputs = inputs.clone()
        outputs[1, 2] /= self.divisor
        return outputs


def run(model, steps, spoil):
    monitor = bnguard.watch(model, every_n_steps=2, on_findings=lambda group: None)
    hooks = []
    for step in range(1, steps + 1):
        inputs = torch.randn(4, 1, 8, 8)
        spoil(model, inputs, step)
        model(inputs)
        monitor.step()
        hooks.append(sum(len(module._forward_hooks) for module in model.modules()))
    report = monitor.report()
    monitor.close()
    assert not any(module._forward_hooks for module in model.modules())
    return report, hooks


def test_a_division_by_zero_is_found_in_its_module_channel_and_sample():
    def spoil(model, inputs, step):
        model.scale.divisor = 0.0 if step in (3, 6) else 1.0

    report, hooks = run(Net(), 8, spoil)
    origin = report.history.run.origin
    assert (origin.module, origin.kind) == ("scale", "Divide")
    assert (origin.channels, origin.samples, origin.step) == ((2,), (1,), 6)
    assert not origin.is_input_bad
    assert origin.bad_parameters == ()
    assert 0.0 < origin.largest_input < 100.0
    assert origin.largest_parameter is None
    # Before the fault was noticed, and after it was found, normal steps pay nothing.
    assert hooks[2] == hooks[0] < hooks[3]
    assert hooks[6] == hooks[0]


def test_bad_data_are_distinguished_from_a_bad_network():
    def spoil(model, inputs, step):
        if step in (3, 5):
            inputs[2, 0, 4, 4] = torch.nan

    report, _ = run(Net(), 6, spoil)
    origin = report.history.run.origin
    assert origin.module == "stem.0"
    assert origin.is_input_bad
    assert (origin.samples, origin.step) == ((2,), 5)


def test_an_overflow_between_modules_is_not_blamed_on_the_data():
    class Scaled(Net):
        def forward(self, inputs):
            return self.tail(self.stem(inputs) * 1e39)

    report, _ = run(Scaled(), 6, lambda model, inputs, step: None)
    (finding,) = [f for f in report.findings if f.code == "BN401"]
    assert finding.layer == "tail.1"
    assert report.history.run.origin.is_input_bad
    assert "data" not in finding.message + finding.fix.summary
    assert "what the forward computes before tail.0 (Conv2d)" in finding.fix.summary


def test_a_parameter_that_is_not_finite_is_named():
    def spoil(model, inputs, step):
        if step == 3:
            with torch.no_grad():
                model.tail[0].weight[5] = torch.inf

    report, _ = run(Net(), 6, spoil)
    origin = report.history.run.origin
    assert (origin.module, origin.bad_parameters, origin.channels) == ("tail.0", ("weight",), (5,))


def test_statistics_poisoned_in_training_are_no_origin_in_evaluation():
    model = Net()
    with bnguard.watch(model, every_n_steps=1, on_findings=lambda group: None) as monitor:
        for step in range(3):
            inputs = torch.randn(4, 1, 8, 8)
            if step == 1:
                inputs[0] = torch.nan
            model(inputs)
            monitor.step()
        model.eval()
        with monitor.evaluation(), torch.no_grad():
            assert not model(torch.randn(4, 1, 8, 8)).isfinite().all()
        assert monitor.report().history.run.origin is None


def test_hooks_that_see_nothing_come_off(monkeypatch):
    monkeypatch.setattr("bnguard.observe.nan_origin._MAX_FORWARDS", 3)

    def spoil(model, inputs, step):
        if step == 3:
            inputs[0] = torch.nan

    _, hooks = run(Net(), 12, spoil)
    assert max(hooks) > hooks[0]
    assert hooks[-1] == hooks[0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_healthy_runs_never_look(value):
    report, hooks = run(Net(), 6, lambda model, inputs, step: None)
    assert report.history.run.origin is None
    assert len(set(hooks)) == 1
