"""Other people's BN classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bnguard
from bnguard.layers.bn_layer import adapter_of, find_layers
from tests.observe.oracle import near


class TutorialNorm(nn.Module):
    """As a textbook writes it: plain attributes, Keras' momentum, and the mode told by autograd."""

    def __init__(self, channels, decay=0.9):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.moving_mean = torch.zeros(1, channels, 1, 1)
        self.moving_var = torch.ones(1, channels, 1, 1)
        self.decay = decay

    def forward(self, inputs):
        if torch.is_grad_enabled():
            mean = inputs.mean((0, 2, 3), keepdim=True)
            var = ((inputs - mean) ** 2).mean((0, 2, 3), keepdim=True)
            self.moving_mean = self.decay * self.moving_mean + (1.0 - self.decay) * mean.detach()
            self.moving_var = self.decay * self.moving_var + (1.0 - self.decay) * var.detach()
        else:
            mean, var = self.moving_mean, self.moving_var
        return self.gamma * (inputs - mean) / torch.sqrt(var + 1e-5) + self.beta


bnguard.register_layer(
    TutorialNorm,
    mean="moving_mean",
    var="moving_var",
    momentum="decay",
    is_momentum_of_old=True,
    eps=1e-5,
    is_training=lambda module: torch.is_grad_enabled(),
)


def test_a_hand_written_layer_is_read_like_any_other():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), TutorialNorm(3), nn.Conv2d(3, 2, 3), TutorialNorm(2))
    seen = {1: [], 3: []}
    for index, statistics in seen.items():
        model[index].register_forward_pre_hook(
            lambda module, args, kept=statistics: kept.append(args[0].detach().double())
        )
    images = torch.randn(9, 8, 1, 8, 8)
    with bnguard.watch(model, on_findings=lambda group: None) as monitor:
        for batch in images[:6]:
            model(batch).square().mean().backward()
            monitor.step()
        trained = {index: list(values) for index, values in seen.items()}
        with torch.no_grad(), monitor.evaluation():
            for batch in images[6:]:
                model(batch)
        layers = {layer.name: layer for layer in monitor.report().layers}
    for index, batches in trained.items():
        layer = layers[str(index)]
        assert (layer.momentum, layer.eps) == (pytest.approx(0.1), 1e-5)
        assert (layer.updates_seen, layer.calls.in_training, layer.unseen_calls) == (6, 6, 0)
        means = np.array([batch.mean((0, 2, 3)).numpy() for batch in batches])
        variances = np.array([batch.var((0, 2, 3), correction=0).numpy() for batch in batches])
        near(layer.window.mean, means.mean(0), 1.0)
        near(layer.window.var_unbiased, variances.mean(0), 1.0)
        near(layer.window.var_of_means, means.var(0, ddof=1), 1.0)
        assert layer.running.mean.shape == layer.window.mean.shape == means.shape[1:]
        assert layer.evaluated.batches == 3
    assert model[1].moving_mean.shape == (1, 3, 1, 1)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision and detectron2 have it: buffers alone, and never a mode."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def forward(self, inputs):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return inputs * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(
            1, -1, 1, 1
        )


@pytest.mark.parametrize("home", ["torchvision.ops.misc", "detectron2.layers.batch_norm"])
def test_a_frozen_class_is_known_by_its_name(home):
    cls = type("FrozenBatchNorm2d", (FrozenBatchNorm2d,), {"__module__": home})
    model = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), cls(3)).train()
    model[1].running_mean.fill_(0.1)  # as loaded
    (layer,) = find_layers(model)
    assert (layer.name, layer.is_training, layer.momentum, layer.counter) == ("1", False, 0.0, None)
    with bnguard.watch(model) as monitor:
        for _ in range(3):
            model(torch.randn(4, 1, 8, 8))
            monitor.step()
        with monitor.evaluation():
            model(torch.randn(4, 1, 8, 8))
        report = monitor.report()
    (history,) = report.layers
    assert history.updates_seen == history.calls.in_training == 0
    assert history.evaluated.batches == 1
    assert all(finding.severity is bnguard.Severity.INFO for finding in report.findings)


def test_a_class_of_the_same_name_from_another_module_is_not_a_layer():
    assert adapter_of(FrozenBatchNorm2d) is None


def test_subclasses_of_a_registered_class_are_found():
    class Wider(TutorialNorm):
        pass

    assert adapter_of(Wider) is adapter_of(TutorialNorm)


def test_only_module_classes_can_be_registered():
    with pytest.raises(bnguard.ConfigurationError, match=r"takes a subclass of torch.nn.Module"):
        bnguard.register_layer(int)


def timm_layers():
    """timm.layers, where timm can be imported beside a CPU-only torch."""
    pytest.importorskip("timm", reason="timm is not installed", exc_type=ImportError)
    return pytest.importorskip("timm.layers", exc_type=ImportError)


@pytest.mark.filterwarnings("ignore")
def test_fused_layers_of_timm_need_no_registration():
    layers = timm_layers()
    model = nn.Sequential(nn.Conv2d(1, 3, 3), layers.BatchNormAct2d(3), layers.SyncBatchNormAct(3))
    frozen = layers.FrozenBatchNormAct2d(3)
    assert [layer.name for layer in find_layers(model)] == ["1", "2"]
    assert not find_layers(nn.Sequential(frozen))[0].is_training
    seen = []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].double()))
    with bnguard.watch(model, on_findings=lambda group: None) as monitor:
        for _ in range(4):
            model(torch.randn(4, 1, 8, 8))
            monitor.step()
        layer = monitor.report().layers[0]
    means = np.array([batch.detach().mean((0, 2, 3)).numpy() for batch in seen])
    near(layer.window.mean, means.mean(0), 1.0)
    assert layer.kind == "BatchNormAct2d"
