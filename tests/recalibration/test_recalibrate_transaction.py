"""Scores, rollback, and a model that stays as it was after any failure."""

import copy
import random
import signal
import threading

import numpy as np
import pytest
import torch
from torch import nn

import bnguard
from bnguard.errors import CalibrationError, ConfigurationError


def net():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.BatchNorm1d(6))
    model(torch.randn(20, 4))
    return model


class Fingerprint:
    """Everything about a model that must be the same afterwards."""

    def __init__(self, model):
        self.state = copy.deepcopy(model.state_dict())
        self.tensors = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
        self.modes = [module.training for module in model.modules()]
        self.hooks = [len(module._forward_pre_hooks) for module in model.modules()]
        self.attributes = [sorted(vars(module)) for module in model.modules()]
        self.random = (torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate())
        self.threads = torch.get_num_threads()

    def check(self, model, *, statistics=True):
        after = Fingerprint(model)
        assert self.tensors == after.tensors
        assert self.modes == after.modes
        assert self.hooks == after.hooks
        assert self.attributes == after.attributes
        assert self.threads == after.threads
        assert torch.equal(self.random[0], after.random[0])
        assert np.array_equal(self.random[1], after.random[1])
        assert self.random[2] == after.random[2]
        assert all(parameter.grad is None for parameter in model.parameters())
        for key, value in self.state.items():
            if statistics or not key.rsplit(".")[-1].startswith(("running", "num_batches")):
                assert torch.equal(
                    value,
                    after.state[key],
                ), key


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"], autouse=True)
def threads(request):
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("method", ["exact", "precise", "adapt"])
def test_nothing_but_the_statistics_changes(method):
    model, x = net(), torch.randn(60, 4) * 2.0
    model[3].momentum = None
    before = Fingerprint(model)
    result = bnguard.recalibrate(model, x.split(7), method=method)
    before.check(model, statistics=False)
    assert result.is_kept
    assert not torch.equal(before.state["1.running_var"], model[1].running_var)


class WritesElsewhere(nn.Module):
    """Moves an average of its own in each forward, and accumulates gradients."""

    def __init__(self):
        super().__init__()
        self.net = net()
        self.register_buffer("average", torch.zeros(6))
        self.register_buffer("newest", torch.zeros(6))

    def forward(self, x):
        x = self.net[:2](x)
        self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
        self.newest = x.mean(0)
        with torch.enable_grad():
            self.net[0](torch.ones(1, 4)).sum().backward()
        return self.net[2:](x)


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_other_state_that_forwards_write_to_is_restored(method):
    model, x = WritesElsewhere(), torch.randn(60, 4)
    gradient = model.net[0].bias.grad = torch.ones(6)
    before = Fingerprint(model)
    bnguard.recalibrate(model, x.split(7), method=method)
    assert model.net[0].bias.grad is gradient
    assert (gradient == 1.0).all()
    model.net[0].bias.grad = None
    before.check(model, statistics=False)


def test_undo_restores_every_bit():
    model, x = net(), torch.randn(60, 4) * 2.0
    before = Fingerprint(model)
    result = bnguard.recalibrate(model, x.split(7))
    after = model[1].running_mean.double().numpy()
    assert np.array_equal(result.after["1"].mean, after)
    assert np.array_equal(result.before["1"].mean, before.state["1.running_mean"].double().numpy())
    result.undo()
    before.check(model)


def failing_loader():
    yield from torch.randn(20, 4).split(5)
    raise OSError("disk on fire")


class FailsLater(nn.Module):
    """Fails between the layers on the last batch, alone or joined to the others."""

    def __init__(self, error):
        super().__init__()
        self.net = net()
        self.error = error

    def forward(self, x):
        x = self.net[:2](x)
        if len(x) in (3, 38):
            raise self.error
        return self.net[2:](x)


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_a_loader_that_fails(method):
    model = net()
    before = Fingerprint(model)
    with pytest.raises(CalibrationError, match="loader failed at batch 4: OSError: disk on fire"):
        bnguard.recalibrate(model, failing_loader(), method=method)
    before.check(model)


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_a_forward_that_fails_halfway(method):
    model = FailsLater(ValueError("no triples"))
    batches = [*torch.randn(35, 4).split(5), torch.randn(3, 4)]
    before = Fingerprint(model)
    with pytest.raises(CalibrationError, match="failed at batch 7: ValueError: no triples"):
        bnguard.recalibrate(model, batches, method=method, memory=10**9)
    before.check(model)


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_memory_that_runs_out(method):
    model = FailsLater(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    batches = [*torch.randn(35, 4).split(5), torch.randn(3, 4)]
    before = Fingerprint(model)
    with pytest.raises(CalibrationError, match=r"out of memory at batch 7: use fewer samples,"):
        bnguard.recalibrate(model, batches, method=method)
    before.check(model)


class Interrupted(nn.Module):
    """Is interrupted in the middle of a forward, as by Ctrl-C."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        x = self.net[:2](x)
        if len(x) in (5, 45):  # The last batch, alone or joined to the others.
            signal.raise_signal(signal.SIGINT)
        return self.net[2:](x)


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_an_interrupt(method):
    model = Interrupted()
    batches = [*torch.randn(40, 4).split(8), torch.randn(5, 4)]
    before, running = Fingerprint(model), threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        bnguard.recalibrate(model, batches, method=method)
    before.check(model)
    assert threading.active_count() == running


def test_a_worse_score_rolls_back():
    model, x = net(), torch.randn(60, 4)
    before = Fingerprint(model)
    scores = iter([0.9, 0.8])
    result = bnguard.recalibrate(model, x.split(7), score=lambda _: next(scores))
    assert (result.is_kept, result.score_before, result.score_after) == (False, 0.9, 0.8)
    assert "the score is worse with the new statistics" in result.notes
    before.check(model)


@pytest.mark.parametrize(("first", "second"), [(0.9, 0.9), (0.8, 0.9), (float("nan"), 0.1)])
def test_a_score_that_is_not_worse_keeps_the_statistics(first, second):
    scores = iter([first, second])
    assert bnguard.recalibrate(net(), [torch.randn(9, 4)], score=lambda _: next(scores)).is_kept


def test_a_score_that_becomes_nan_rolls_back():
    scores = iter([0.5, float("nan")])
    assert not bnguard.recalibrate(net(), [torch.randn(9, 4)], score=lambda _: next(scores)).is_kept


def test_statistics_can_be_kept_in_any_case():
    scores = iter([0.9, 0.8])
    result = bnguard.recalibrate(
        net(), [torch.randn(9, 4)], score=lambda _: next(scores), keep="always"
    )
    assert result.is_kept


def test_the_score_sees_eval_mode_and_the_statistics_of_its_moment():
    model, x = net().train(), torch.randn(60, 4)
    seen = []

    def score(model):
        seen.append((model.training, torch.is_grad_enabled(), model[1].running_mean.clone()))
        return 1.0

    before = model[1].running_mean.clone()
    bnguard.recalibrate(model, [x], score=score)
    assert [mode for mode, _, _ in seen] == [False, False]
    assert not any(grad for _, grad, _ in seen)
    assert torch.equal(seen[0][2], before)
    assert torch.equal(seen[1][2], model[1].running_mean)
    assert model.training


def test_a_score_that_trains_moves_no_statistics():
    def score(model):
        model.train()
        model(torch.randn(20, 4) + 5)
        return 1.0

    model, twin = net(), net()
    twin.load_state_dict(model.state_dict())
    batches = torch.randn(40, 4).split(8)
    bnguard.recalibrate(model, batches, score=score)
    bnguard.recalibrate(twin, batches)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


def test_a_score_that_fails_rolls_back():
    model, x = net(), torch.randn(9, 4)
    before = Fingerprint(model)
    scores = iter([1.0])
    with pytest.raises(StopIteration):
        bnguard.recalibrate(model, [x], score=lambda _: next(scores))
    before.check(model)


def test_a_score_that_is_always_nan_rolls_back():
    nan = float("nan")
    assert not bnguard.recalibrate(net(), [torch.randn(9, 4)], score=lambda _: nan).is_kept


def test_a_score_that_does_not_return_a_number_is_refused_and_rolls_back():
    model, batch = net(), torch.randn(9, 4)
    before = Fingerprint(model)
    with pytest.raises(ConfigurationError, match=r"score has to be a number.*not None"):
        bnguard.recalibrate(model, [batch], score=lambda _: None)
    before.check(model)


@pytest.mark.parametrize(
    ("momentum", "before", "after"),
    [(0.1, 0, 29), (0.1, 100, 103), (None, 0, 29), (0.0, 5, 29), (0.01, 0, 299)],
)
def test_the_counter_moves_until_the_initial_values_count_as_forgotten(momentum, before, after):
    model = nn.BatchNorm1d(4, momentum=momentum)
    model.num_batches_tracked.fill_(before)
    bnguard.recalibrate(model, torch.randn(30, 4).split(10))
    assert int(model.num_batches_tracked) == after


def test_statistics_that_the_buffers_cannot_hold():
    model = nn.Sequential(nn.BatchNorm1d(4).half(), nn.BatchNorm1d(4).half())
    x = (torch.randn(64, 4) * 2000.0).half()
    before = Fingerprint(model)
    with pytest.raises(CalibrationError, match=r"0: the statistics reach \S+e\+06, .* in float16"):
        bnguard.recalibrate(model, x.split(8))
    before.check(model)


def test_values_whose_squares_overflow_float32_are_finite():
    model = nn.BatchNorm1d(4)
    with pytest.raises(CalibrationError, match=r"the statistics reach \S+e\+40, .* in float32"):
        bnguard.recalibrate(model, (torch.randn(64, 4) * 1e20).split(8))
    model = nn.BatchNorm1d(4).double()
    result = bnguard.recalibrate(model, (torch.randn(64, 4).double() * 1e20).split(8))
    assert (result.after[""].var > 1e39).all()


def test_poisoned_statistics_are_repaired():
    model, x = net(), torch.randn(60, 4)
    clean = copy.deepcopy(model)
    model[1].running_mean[2] = float("nan")
    model[3].running_var.fill_(float("inf"))
    result = bnguard.recalibrate(model, x.split(7))
    bnguard.recalibrate(clean, x.split(7))
    for index in (1, 3):
        assert torch.equal(model[index].running_mean, clean[index].running_mean)
        assert torch.equal(model[index].running_var, clean[index].running_var)
    assert result.layers[0].max_shift_std is None
    assert result.layers[1].extreme_log_variance_ratio is None
