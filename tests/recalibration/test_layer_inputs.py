"""Reading the inputs of a layer in a forward, and setting its statistics from them."""

import math

import pytest
import torch
from torch import nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import find_layers
from bnguard.layers.moments import Moments, channel_moments
from bnguard.recalibration.layer_inputs import input_moments, is_finite, read_inputs
from bnguard.recalibration.statistics import NonFiniteError
from tests.recalibration.jobs import job_of


def test_values_are_read_after_the_hooks_of_the_user():
    module = nn.BatchNorm1d(2)
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    seen = []
    with read_inputs(find_layers(module), lambda index, values: seen.append((index, values))):
        module(torch.ones(3, 2))
    module(torch.ones(3, 2))
    ((index, values),) = seen
    assert index == 0
    assert (values == 2.0).all()
    assert len(module._forward_pre_hooks) == 1


def test_hooks_are_removed_after_an_error():
    module = nn.BatchNorm1d(2)
    with pytest.raises(RuntimeError), read_inputs(find_layers(module), lambda index, values: None):
        module(torch.ones(3, 5))
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_make_moments_that_are_not(value):
    values = torch.randn(8, 2, 3, 3)
    assert is_finite(input_moments(values))
    values[1, 0, 1, 1] = value
    assert not is_finite(input_moments(values))


def test_squares_beyond_float32_are_finite():
    moments = input_moments(torch.randn(50, 2) * 1e30)
    assert is_finite(moments)
    assert (moments.var_unbiased > 1e58).all()


def test_either_part_counts():
    good, bad = torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, math.nan])
    assert not is_finite(Moments(3, bad, good))
    assert not is_finite(Moments(3, good, bad))


def test_parts_are_pooled():
    model, x = nn.BatchNorm1d(3), torch.randn(30, 3) * 2.0 + torch.arange(30.0).view(-1, 1)
    job_of(model).set_statistics(0, [channel_moments(part) for part in x.split(7)], 30)
    assert torch.allclose(model.running_mean, x.mean(0), rtol=1e-5)
    assert torch.allclose(model.running_var, x.var(0), rtol=1e-5)


def test_nonfinite_inputs_are_an_error_that_names_the_layer():
    bad = torch.randn(4, 3)
    bad[0, 0] = math.nan
    parts = [channel_moments(torch.randn(4, 3)), channel_moments(bad)]
    with pytest.raises(NonFiniteError) as raised:
        job_of(nn.BatchNorm1d(3)).set_statistics(0, parts, 8)
    assert raised.value.index == 0


def test_one_value_is_too_few():
    with pytest.raises(CalibrationError, match="1 value a channel is too few"):
        job_of(nn.BatchNorm1d(3)).set_statistics(0, [channel_moments(torch.ones(1, 3))], 1)
