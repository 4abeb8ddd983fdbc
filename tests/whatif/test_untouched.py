"""The model is as it was found, whatever happens."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

import bnguard
from bnguard.errors import CalibrationError


def net():
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 3)
    )
    model(torch.randn(20, 4) + 1.0)
    return model


class Fingerprint:
    """Everything about a model that must be the same afterwards."""

    def __init__(self, model):
        tensors = model.state_dict(keep_vars=True)
        self.values = {key: value.detach().clone() for key, value in tensors.items()}
        self.tensors = {key: (id(value), value._version) for key, value in tensors.items()}
        self.modes = [module.training for module in model.modules()]
        self.hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        self.attributes = [sorted(vars(module)) for module in model.modules()]
        self.grads = [parameter.grad for parameter in model.parameters()]
        self.random = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        self.is_grad_enabled = torch.is_grad_enabled()

    def check(self, model):
        after = Fingerprint(model)
        for name in ("tensors", "modes", "hooks", "attributes", "grads", "is_grad_enabled"):
            assert getattr(self, name) == getattr(after, name), name
        assert all(torch.equal(value, after.values[key]) for key, value in self.values.items())
        assert torch.equal(self.random[0], after.random[0])
        assert np.array_equal(self.random[1], after.random[1])
        assert self.random[2] == after.random[2]


def to_train(model):
    return model.train()


def to_eval(model):
    return model.eval()


def with_a_frozen_layer(model):
    model.train()
    model[1].eval()
    return model


X = torch.randn(60, 4)


@pytest.mark.parametrize("prepare", [to_train, to_eval, with_a_frozen_layer])
def test_nothing_of_the_model_changes(prepare):
    model = prepare(net())
    before = Fingerprint(model)
    seen = []

    def score(scored):
        seen.append((scored is model, scored.training, torch.is_grad_enabled()))
        torch.randn(3)
        scored.train()
        return 1.0

    bnguard.diagnose(model, X.split(7), X.split(8), score)
    assert set(seen) == {(True, False, False)}
    before.check(model)
    assert bnguard.diagnose(model, X.split(7), X.split(8)).layers  # with a bisection
    before.check(model)


def test_a_backward_that_waits_for_the_buffers_still_works():
    model = net().train()
    loss = model(X).square().mean()
    bnguard.diagnose(model, X.split(7))
    loss.backward()


def test_input_that_the_forward_writes_to_is_the_same_for_every_row():
    class Doubles(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return self.net(x.mul_(2.0))

    batches = [x.clone() for x in X.split(10)]
    found = bnguard.diagnose(Doubles(), batches)
    assert found.row("evaluation").change == 0.0
    assert torch.equal(torch.cat(batches), X)


class Interrupted(nn.Module):
    """Raises from its forward of the number given on."""

    def __init__(self, error, at):
        super().__init__()
        self.net, self.error, self.left = net(), error, [at]

    def forward(self, x):
        x = self.net[:2](x)
        self.left[0] -= 1
        if self.left[0] <= 0:
            raise self.error
        return self.net[2:](x)


@pytest.mark.parametrize("at", [3, 20, 40, 60, 75])
@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_after_an_exception_in_the_forward(at, error):
    model = Interrupted(error, at)
    before = Fingerprint(model)
    with pytest.raises((CalibrationError, KeyboardInterrupt)):
        bnguard.diagnose(model, X.split(7), X.split(7))
    assert model.left[0] <= 0
    before.check(model)


@pytest.mark.parametrize("error", [ZeroDivisionError("zero"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_after_an_exception_in_the_score(at, error):
    model, calls = net(), []
    before = Fingerprint(model)

    def score(scored):
        calls.append(scored)
        if len(calls) == at:
            raise error
        return 1.0

    with pytest.raises(type(error)):
        bnguard.diagnose(model, X.split(7), score=score)
    before.check(model)


def test_after_an_exception_in_the_loader():
    def loader():
        yield from X.split(20)
        raise OSError("disk on fire")

    model = net()
    before = Fingerprint(model)
    with pytest.raises(CalibrationError, match="loader failed at batch 3: OSError: disk on fire"):
        bnguard.diagnose(model, loader())
    before.check(model)


def test_a_copy_and_the_original_are_diagnosed_alike():
    model = net()
    first = bnguard.diagnose(model, X.split(7)).to_dict()
    assert bnguard.diagnose(copy.deepcopy(model), X.split(7)).to_dict() == first
    assert bnguard.diagnose(model, X.split(7)).to_dict() == first
