"""What runs where the tensors are does without float64, which Apple's devices lack."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bnguard


class _NoFloat64(TorchDispatchMode):
    """Raises where an operation gives float64, as such a device does."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64:
                raise TypeError(f"{func} gives float64")
        return result


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6)
    )


def watched(model, batches, *, without_float64):
    monitor = bnguard.watch(model, every_n_steps=1000, on_findings=lambda group: None)
    for batch in batches:
        with _NoFloat64() if without_float64 else nullcontext():
            model(batch)
        monitor.step()
    model.eval()
    with torch.no_grad(), monitor.evaluation():
        for batch in batches[:4]:
            with _NoFloat64() if without_float64 else nullcontext():
                model(batch)
    monitor.close()
    return monitor.report()


@pytest.mark.parametrize("momentum", [0.1, 0.0001])  # read from the buffers, and from the calls
def test_watching_gives_the_same_without_float64(monkeypatch, momentum):
    model = network()
    for layer in (model[1], model[4]):
        layer.momentum = momentum
    state = {key: value.clone() for key, value in model.state_dict().items()}
    batches = torch.randn(30, 16, 1, 6, 6).unbind()
    expected = watched(model, batches, without_float64=False)
    model.load_state_dict(state)
    model.train()
    monkeypatch.setattr("bnguard.layers.moments._WITHOUT_FLOAT64", frozenset({"cpu"}))
    found = watched(model, batches, without_float64=True)
    assert [finding.code for finding in found.findings] == [f.code for f in expected.findings]
    for one, other in zip(found.layers, expected.layers, strict=True):
        assert one.window.var_unbiased == pytest.approx(other.window.var_unbiased, rel=1e-3)
        assert one.evaluated.mean == pytest.approx(other.evaluated.mean, abs=1e-5)


def test_recalibration_gives_the_same_without_float64(monkeypatch):
    model = network()
    batches = torch.randn(10, 16, 1, 6, 6).unbind()
    expected = bnguard.recalibrate(model, batches)
    expected.undo()
    monkeypatch.setattr("bnguard.layers.moments._WITHOUT_FLOAT64", frozenset({"cpu"}))
    found = bnguard.recalibrate(model, batches)
    for name, statistics in found.after.items():
        assert statistics.var == pytest.approx(expected.after[name].var, rel=1e-4)
