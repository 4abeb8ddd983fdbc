"""What arrives at a layer, read in a forward."""

import math

import pytest
import torch
from torch import nn

from bnguard.layers.bn_layer import find_layers
from bnguard.layers.moments import Moments
from bnguard.recalibration.layer_inputs import arrivals, arrived_moments, is_finite


def test_values_are_those_that_enter_the_layer_after_the_hooks_that_are_there():
    module = nn.BatchNorm1d(2)
    module.register_forward_pre_hook(lambda module, args: (args[0] * 2.0,))
    seen = []
    with arrivals(find_layers(module), lambda index, values: seen.append((index, values))):
        module(torch.ones(3, 2))
    module(torch.ones(3, 2))
    ((index, values),) = seen
    assert index == 0
    assert (values == 2.0).all()
    assert len(module._forward_pre_hooks) == 1


def test_hooks_are_gone_after_an_error():
    module = nn.BatchNorm1d(2)
    with pytest.raises(RuntimeError), arrivals(find_layers(module), lambda index, values: None):
        module(torch.ones(3, 5))
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_make_moments_that_are_not(value):
    values = torch.randn(8, 2, 3, 3)
    assert is_finite(arrived_moments(values))
    values[1, 0, 1, 1] = value
    assert not is_finite(arrived_moments(values))


def test_squares_beyond_float32_are_finite_all_the_same():
    moments = arrived_moments(torch.randn(50, 2) * 1e30)
    assert is_finite(moments)
    assert (moments.var_unbiased > 1e58).all()


def test_either_part_counts():
    good, bad = torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, math.nan])
    assert not is_finite(Moments(3, bad, good))
    assert not is_finite(Moments(3, good, bad))
