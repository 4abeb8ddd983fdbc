"""Modules that normalise over the batch and are not known as BN layers."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from bnguard.layers.bn_layer import _ADAPTERS
from bnguard.observe import unknown_layers
from bnguard.observe.training_plan import plan_training


class OfOldValue(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.decay, self.epsilon = 0.9, 1e-3
        self.gamma, self.beta = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.ones(channels)),
        )
        self.moving_mean, self.moving_var = torch.zeros(channels), torch.ones(channels)

    def forward(self, inputs):
        mean, var = self.moving_mean, self.moving_var
        if self.training:
            mean, var = inputs.mean(0), inputs.var(0, correction=0)
            with torch.no_grad():
                self.moving_mean = self.decay * self.moving_mean + (1 - self.decay) * mean
                self.moving_var = self.decay * self.moving_var + (1 - self.decay) * var
        return self.gamma * (inputs - mean) / torch.sqrt(var + self.epsilon) + self.beta


class Functional(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, inputs):
        return F.batch_norm(inputs, self.mean, self.var, training=self.training)


class WithoutStatistics(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, inputs):
        return F.batch_norm(inputs, None, None, training=True)


class MadeInForward(nn.Module):
    def __init__(self, channels):
        super().__init__()

    def forward(self, inputs):
        return nn.BatchNorm1d(inputs.shape[1])(inputs)


class Scaler(nn.Module):
    """Constants of the data, which no batch changes."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, inputs):
        return (inputs - self.mean) / self.var.sqrt()


def network(kind):
    return nn.Sequential(nn.Linear(4, 6), kind(6), nn.ReLU(), nn.Linear(6, 2))


@pytest.fixture
def unregistered():
    yield
    _ADAPTERS.pop(OfOldValue, None)


@pytest.mark.filterwarnings("ignore")
def report_of(model, steps=8):
    with bnguard.watch(model, on_findings=lambda group: None, strict=True) as monitor:
        for _ in range(steps):
            model(torch.randn(16, 4)).square().mean().backward()
            monitor.step()
        return monitor.report()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "advice"),
    [
        (
            OfOldValue,
            'register_layer(OfOldValue, mean="moving_mean", var="moving_var", momentum="decay", '
            'is_momentum_of_old=True, eps="epsilon")',
        ),
        (Functional, 'register_layer(Functional, mean="mean", var="var"'),
        (WithoutStatistics, "call a torch.nn.BatchNorm module"),
        (MadeInForward, "make the BatchNorm1d in __init__"),
    ],
)
def test_an_unknown_layer_is_named_with_its_place_and_the_remedy(kind, advice):
    report = report_of(network(kind))
    (note,) = (note for note in report.notes if "normalises over" in note)
    assert note.startswith(f"1 ({kind.__name__}, test_unknown_layers.py:")
    assert advice in note
    assert "no problems found in these, but not all" in str(report).replace("\n", " ")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [nn.BatchNorm1d, Scaler, nn.LayerNorm])
def test_known_layers_and_other_norms_are_not_named(kind):
    assert report_of(network(kind)).history.run.unknown == ()


@pytest.mark.filterwarnings("ignore")
def test_after_registration_everything_works_and_unsaved_statistics_are_reported(unregistered):
    bnguard.register_layer(
        OfOldValue,
        mean="moving_mean",
        var="moving_var",
        momentum="decay",
        is_momentum_of_old=True,
        eps="epsilon",
    )
    model = network(OfOldValue)
    report = report_of(model)
    assert report.history.run.unknown == ()
    assert report.layers[0].momentum == pytest.approx(0.1)
    assert any(
        "moving_mean and moving_var of layer 1 are not in the state" in n for n in report.notes
    )
    loader = DataLoader(TensorDataset(torch.randn(128, 4) + 1.0, torch.randint(2, (128,))), 32)
    bnguard.recalibrate(model, loader, progress=False)
    bnguard.diagnose(model, loader)
    swap = bnguard.swap(model, to="group", teacher_data=loader, steps=2, progress=False)
    assert len(swap.replaced) == 1


def loader(labels, *, shuffle=False):
    return DataLoader(TensorDataset(torch.zeros(len(labels), 1), labels), 8, shuffle=shuffle)


def test_a_loader_in_order_gives_the_length_of_label_runs():
    plan = plan_training(loader(torch.arange(10).repeat_interleave(30)))
    assert plan.label_run == 30.0
    assert plan.shuffled_label_run == pytest.approx(1 / 0.9)
    assert plan_training(loader(torch.zeros(10).long())).label_run is None
    assert plan_training(loader(torch.arange(10), shuffle=True)).label_run is None
    assert plan_training(loader(torch.rand(10))).label_run is None
    graphs = loader(torch.arange(10).repeat_interleave(30))
    graphs.dataset.y = torch.arange(4).repeat_interleave(300)  # a label for each node
    assert plan_training(graphs).label_run is None


@pytest.mark.parametrize("event", ["closes", "raises", "pauses"])
def test_no_function_mode_outlives_the_first_forward(event):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            if event == "closes":
                monitor.close()
            if event == "raises":
                raise KeyError("of the user's")
            if event == "pauses":
                monitor._observer._unknown.hooks._is_paused = True
            return self.norm(x)

    model = Net()
    monitor = bnguard.watch(model)
    before = torch._C._len_torch_function_stack()
    with contextlib.suppress(KeyError):
        model(torch.randn(8, 3))
    assert torch._C._len_torch_function_stack() == before
    monitor.close()
    assert not model._forward_hooks


def test_few_of_many_calls_are_read(monkeypatch):
    """Reading every call took 92 % of a step of a small network."""
    reads = []
    moments = unknown_layers.channel_moments
    monkeypatch.setattr(
        unknown_layers, "channel_moments", lambda values: reads.append(1) or moments(values)
    )
    model = network(Scaler)
    probe = unknown_layers.UnknownProbe(model, ())
    for _ in range(1024):
        model(torch.randn(16, 4))
    assert len(reads) == 12  # the first 4 calls, then 8, 16, …, 1024
    probe.hooks.close()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
