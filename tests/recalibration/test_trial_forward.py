"""Traits of a model that a first small forward shows."""

import pytest
import torch
from torch import nn

from bnguard.recalibration.batches import Batch
from bnguard.recalibration.trial_forward import find_traits
from tests.recalibration.jobs import job_of


def traits_of(model, x):
    with torch.no_grad():
        return find_traits(job_of(model), Batch(0, (x,), {}, len(x)))


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
    traits = traits_of(Model(), torch.randn(5, 4))
    assert traits.calls == (0, 1)
    assert traits.takes_rows
    assert traits.is_regular
    assert not traits.reads_values
    assert not traits.draws_random
    assert not traits.keeps_state
    assert not traits.starts_threads


def branch(self, x):
    return x if x.mean() > 0 else 2 * x


@pytest.mark.parametrize(
    "between",
    [branch, lambda self, x: x * x.sum().item(), lambda self, x: x[: int(x.count_nonzero())]],
    ids=["branch", "number", "length"],
)
def test_a_model_that_looks_at_values(between):
    assert traits_of(Model(between), torch.randn(5, 4)).reads_values


def test_values_behind_the_last_layer_decide_nothing():
    class Thresholded(Model):
        def forward(self, x):
            x = super().forward(x)
            return x if x.mean() > 0 else 2 * x

    assert not traits_of(Thresholded(), torch.randn(5, 4)).reads_values


def test_a_forward_that_fails_on_few_samples():
    def pairs(self, x):
        assert len(x) == 6
        return x

    traits = traits_of(Model(pairs), torch.randn(6, 4))
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


@pytest.mark.parametrize(
    ("between", "is_channels_last"),
    [(lambda x: x, True), (only_contiguous, False)],
    ids=["any layout", "one layout"],
)
def test_images_are_in_channels_last_unless_that_fails(between, is_channels_last):
    traits = traits_of(Convolutional(between), torch.randn(5, 3, 6, 7))
    assert traits.is_channels_last is is_channels_last
    assert traits.takes_rows


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
    [set_attribute, fill_dictionary, keep_out_of_sight, write_in_place],
    ids=["attribute", "dictionary", "out of sight", "in place"],
)
def test_models_that_keep_something(between):
    model = Model(between)
    model.register_buffer("total", torch.zeros(1))
    assert traits_of(model, torch.randn(5, 4)).keeps_state


def test_a_model_that_draws_random_numbers():
    assert traits_of(Model(lambda self, x: x + torch.rand_like(x)), torch.randn(5, 4)).draws_random


def test_several_calls_of_a_layer():
    traits = traits_of(Model(lambda self, x: self.first(x)), torch.randn(5, 4))
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


def test_bytes_are_the_most_that_live_at_once():
    # The input and its copy, y, and relu(y) next to z, of 100 float32 each; then y is gone.
    traits = traits_of(Residual(), torch.randn(6, 100))
    assert traits.bytes_per_sample == 5 * 400 + 1
