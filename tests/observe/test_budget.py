"""What is left out to keep the cost of watching low, and what is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnguard
from bnguard.observe import budget


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(budget, "STEPS_ALWAYS_READ", 20)


def train(*, model=None, steps=100, poisoned=None, evaluated=(), **options):
    """Train with next to no budget, so that all is passed over that may be."""
    torch.manual_seed(0)
    model = model or nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    options = {"max_overhead": 1e-9, "every_n_steps": 10, "strict": True, **options}
    with bnguard.watch(model, on_findings=lambda group: None, **options) as monitor:
        for step in range(1, steps + 1):
            inputs = torch.randn(8, 4)
            if step == poisoned:
                inputs[0] = torch.nan
            loss = model(inputs).square().mean()
            if loss.isfinite():
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            monitor.step()
            if step in evaluated:
                with torch.no_grad(), monitor.evaluation():
                    model.eval()(torch.randn(32, 4))
                model.train()
        return monitor.report()


def test_steps_are_passed_over_and_their_updates_counted():
    report = train(evaluated=(10, 50, 60))
    overhead = report.history.run.overhead
    assert (overhead.steps_left_out, overhead.evaluations_left_out) == (80, 2)
    assert overhead.seconds > 0.0
    for layer in report.layers:
        assert layer.updates_seen == layer.running.updates == 100
        assert layer.calls.in_training == 100
        assert layer.window.batches.tolist() == [10.0] * 6
        assert layer.evaluated.step == 10
    assert any("80 of 100 steps and 2 evaluations were left out" in n for n in report.notes)


def test_the_step_that_poisons_is_known_though_it_was_passed_over():
    report = train(poisoned=67)
    assert [layer.poisoned_step for layer in report.layers] == [67, 67]


@pytest.mark.parametrize("options", [{"max_overhead": 0.0}, {"restore_poisoned": True}])
def test_every_step_is_read_where_it_has_to_be(options):
    report = train(steps=40, **options)
    assert report.history.run.overhead.steps_left_out == 0
    assert {layer.updates_seen for layer in report.layers} == {40}


class InRows(nn.BatchNorm1d):
    """Keeps its statistics in rows of two."""

    def __init__(self):
        super().__init__(6)
        self.running_mean, self.running_var = torch.zeros(3, 2), torch.ones(3, 2)

    def forward(self, x):
        mean, var = self.running_mean.view(-1), self.running_var.view(-1)
        self.num_batches_tracked += 1
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, self.training)


@pytest.mark.filterwarnings("ignore:bnguard. Linear has no BN layers")
@pytest.mark.parametrize(
    "norm",
    [None, nn.BatchNorm1d(6, track_running_stats=False), nn.LazyBatchNorm1d(), InRows()],
    ids=["no layer", "untracked", "lazy", "rows"],
)
def test_steps_are_passed_over_whatever_the_layers_are(norm):
    model = nn.Linear(4, 6) if norm is None else nn.Sequential(nn.Linear(4, 6), norm)
    model(torch.randn(8, 4))
    assert train(model=model).history.run.overhead.steps_left_out == 80


def test_the_last_of_the_planned_steps_are_read():
    report = train(planned_steps=100)
    assert report.history.run.overhead.steps_left_out == 60
    assert report.layers[0].window.batches.max() == 10.0


@pytest.mark.parametrize("budget", [-1, float("nan"), "2%"])
def test_a_budget_that_is_not_a_share_is_refused(budget):
    with pytest.raises(bnguard.ConfigurationError, match=r"max_overhead=.* is not a share"):
        bnguard.watch(nn.BatchNorm1d(2), max_overhead=budget)
