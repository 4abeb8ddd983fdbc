"""The inputs of the model are seen, whichever module the training step calls."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnguard
from bnguard.observe.model_inputs import Entrance


class Module(nn.Module):
    """As many write a LightningModule: its own forward is never called in training."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, inputs, scale=None):
        inputs = inputs if scale is None else inputs * scale
        return self.head(self.backbone(inputs))

    def loss(self, inputs):
        return self.head(self.backbone(inputs)).square().mean()


def seen(model, call):
    noted = []
    entrance = Entrance(model, lambda inputs: noted.append([values.shape for values in inputs]))
    entrance.follow(next(part for part in model.modules() if isinstance(part, nn.BatchNorm1d)))
    call()
    entrance.hooks.close()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    return noted


def test_the_outermost_call_counts_once_whatever_is_called():
    model, batch = Module(), torch.randn(16, 4)
    assert seen(model, lambda: model(batch)) == [[(16, 4)]]
    assert seen(model, lambda: model.loss(batch)) == [[(16, 4)]]
    assert seen(model, lambda: (model.loss(batch), model(batch))) == [[(16, 4)]] * 2


def test_keywords_and_whole_numbers_are_seen():
    model, batch = Module(), torch.randn(16, 4)
    call = lambda: model(inputs=batch, scale=torch.tensor(2.0))  # noqa: E731
    assert seen(model, call) == [[(16, 4), ()]]
    labels = nn.Sequential(nn.Embedding(5, 4), nn.BatchNorm1d(4))
    assert seen(labels, lambda: labels(torch.tensor([0, 1, 2]))) == [[(3,)]]


def test_evaluation_and_no_grad_are_not_seen():
    model, batch = Module(), torch.randn(16, 4)
    assert seen(model, torch.no_grad()(lambda: model(batch))) == []
    assert seen(model.eval(), lambda: model(batch)) == []


def test_a_forward_that_raises_leaves_nothing_behind():
    model, batch = Module(), torch.randn(16, 4)

    def call():
        with pytest.raises(RuntimeError):
            model(torch.randn(16, 3))
        model(batch)

    assert seen(model, call) == [[(16, 3)], [(16, 4)]]


@pytest.mark.parametrize("is_forward_called", [True, False])
def test_nan_in_the_data_is_distinguished_from_the_weights_that_it_ruins(is_forward_called):
    torch.manual_seed(0)
    model = Module()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = bnguard.watch(model, every_n_steps=4, on_findings=lambda group: None)
    for step in range(1, 13):
        batch = torch.randn(16, 4)
        if step == 6:
            batch[3, 1] = torch.inf
        loss = model(batch).square().mean() if is_forward_called else model.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.step()
    report = monitor.report()
    assert report.history.run.bad_input_step == 6
    # A forward of weights that are not finite was seen since; it is not where this began.
    assert report.history.run.origin.bad_parameters
    finding = next(finding for finding in report.findings if finding.code == "BN401")
    assert finding.step == 6
    assert "the model's input already did; the weights are not finite since" in finding.message
    assert "go back to a checkpoint whose weights are finite" in finding.fix.summary


def test_large_half_precision_inputs_are_finite():
    model = Module()
    monitor = bnguard.watch(model)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.full((16, 4), 6e4).half())
    monitor.step()
    assert monitor.report().history.run.bad_input_step is None
