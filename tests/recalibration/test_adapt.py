"""Statistics of new data, mixed with those from before."""

import math

import pytest
import torch
from torch import nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import find_layers
from bnguard.layers.moments import channel_moments
from bnguard.recalibration.pooled import mix_with_source


def layer_with(mean, var):
    module = nn.BatchNorm1d(1)
    module.running_mean.fill_(mean)
    module.running_var.fill_(var)
    return find_layers(module)[0]


@pytest.mark.parametrize(("prior", "weight"), [(2, 0.5), (6, 0.25), (1e-9, 1.0)])
def test_new_samples_and_the_prior_weigh_as_their_numbers(prior, weight):
    layer = layer_with(10.0, 4.0)
    moments = channel_moments(torch.tensor([[0.0], [2.0]]))
    estimate = mix_with_source([layer], prior)(layer, moments, 2)
    assert math.isclose(estimate.mean.item(), 10.0 * (1 - weight) + 1.0 * weight, abs_tol=1e-6)
    assert math.isclose(estimate.var.item(), 4.0 * (1 - weight) + 2.0 * weight, abs_tol=1e-6)
    assert estimate.values == 2


def test_the_source_is_read_once():
    layer = layer_with(10.0, 4.0)
    mixed = mix_with_source([layer], 2)
    layer.module.running_mean.fill_(99.0)
    assert mixed(layer, channel_moments(torch.tensor([[0.0], [2.0]])), 2).mean.item() == 5.5


def test_a_source_that_is_not_finite():
    with pytest.raises(CalibrationError, match="use prior 0"):
        mix_with_source([layer_with(0.0, math.inf)], 2)
