"""Traits of a model that a first small forward shows."""

import pytest
import torch
from torch import nn

from bnguard.recalibration.batches import Batch
from bnguard.recalibration.trial_forward import find_traits
from tests.recalibration.jobs import job_of


def habits_of(model, x, *, batches=1):
    with torch.no_grad():
        return find_traits(job_of(model), [Batch(i, (x,), {}, len(x)) for i in range(batches)])


class Model(nn.Module):
    """Does something between two layers."""

    def __init__(self, between=lambda self, x: x):
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.between = between
        self.kept = {}

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


def test_an_ordinary_model():
    traits = habits_of(Model(), torch.randn(5, 4))
    assert traits.calls == (0, 1)
    assert traits.takes_rows
    assert traits.is_stateless
    assert traits.is_regular
    assert not traits.starts_threads


@pytest.mark.parametrize(
    "between",
    [
        lambda self, x: x - x.mean(0),
        lambda self, x: x.softmax(0),
        lambda self, x: nn.functional.batch_norm(x, None, None, training=True),
        lambda self, x: x.cumsum(0),
        lambda self, x: x + torch.rand_like(x),
    ],
    ids=["centred", "softmax", "untracked", "cumulative", "random"],
)
def test_samples_that_depend_on_one_another(between):
    assert not habits_of(Model(between), torch.randn(5, 4)).takes_rows


@pytest.mark.parametrize("batches", [1, 2])
def test_batches_of_one_sample_take_two(batches):
    assert habits_of(Model(), torch.randn(1, 4), batches=batches).takes_rows is (batches == 2)


def test_a_forward_that_fails_on_few_samples():
    def pairs(self, x):
        assert len(x) == 6
        return x

    traits = habits_of(Model(pairs), torch.randn(6, 4))
    assert traits.calls == (0, 1)
    assert not traits.takes_rows


class Convolutional(nn.Module):
    """Does something between two convolutions."""

    def __init__(self, between=lambda x: x):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.between = between

    def forward(self, x):
        return self.norm(self.second(self.between(self.first(x))))


def only_contiguous(x):
    return x.view(len(x), -1).tanh().view(x.shape)


def in_memory_order(x):
    """Give other values where the layout is another."""
    return x * torch.linspace(0, 1, x.numel()).as_strided(x.shape, x.stride())


@pytest.mark.parametrize(
    ("between", "is_channels_last", "takes_rows"),
    [
        (lambda x: x, True, True),
        (only_contiguous, False, True),
        (in_memory_order, False, False),
        (lambda x: x - x.mean(0), False, False),
    ],
    ids=["any layout", "one layout", "by layout", "centred"],
)
def test_images_are_in_channels_last_if_that_changes_nothing(between, is_channels_last, takes_rows):
    traits = habits_of(Convolutional(between), torch.randn(5, 3, 6, 7))
    assert traits.is_channels_last is is_channels_last
    assert traits.takes_rows is takes_rows


def set_attribute(self, x):
    self.feature = x
    return x


def fill_dictionary(self, x):
    self.kept["feature"] = x
    return x


def keep_out_of_sight(self, x, kept=[]):  # noqa: B006
    kept[:] = [x.relu()]
    return x


def write_in_place(self, x):
    self.total.add_(1)
    return x


@pytest.mark.parametrize(
    "between",
    [
        set_attribute,
        fill_dictionary,
        keep_out_of_sight,
        write_in_place,
        lambda self, x: x + torch.rand_like(x),
    ],
    ids=["attribute", "dictionary", "out of sight", "in place", "random"],
)
def test_models_that_keep_or_draw_something(between):
    model = Model(between)
    model.register_buffer("total", torch.zeros(1))
    assert not habits_of(model, torch.randn(5, 4)).is_stateless


def test_several_calls_of_a_layer():
    traits = habits_of(Model(lambda self, x: self.first(x)), torch.randn(5, 4))
    assert traits.calls == (0, 0, 1)
    assert not traits.is_regular


class Residual(nn.Module):
    """Holds its input and one output when it calls its layer."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(100)

    def forward(self, x):
        y = x * 2.0
        z = torch.relu(y) + 1.0
        del y
        return x + self.norm(z)


def test_bytes_are_those_of_live_tensors_at_a_layer():
    # The input and its copy, and z, of 100 float32 each; y is gone.
    traits = habits_of(Residual(), torch.randn(6, 100))
    assert traits.bytes_per_sample == 3 * 400 + 1
