"""Inputs of layers in a forward, and statistics in place of the model's own."""

import math

import pytest
import torch
from torch import nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import find_layers
from bnguard.layers.moments import Moments, channel_moments
from bnguard.recalibration.replay import perturb_statistics
from bnguard.recalibration.statistics import (
    NonFiniteError,
    current_statistics,
    fit_to_buffer,
    input_moments,
    prepare_for_calibration,
    read_inputs,
    replace_statistics,
)
from tests.recalibration.jobs import job_of


@pytest.mark.parametrize("fails", [False, True])
def test_the_tensors_of_the_model_are_restored_unchanged(fails):
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(5.0)
    (layer,), mean = find_layers(module), module.running_mean
    try:
        with prepare_for_calibration(module, [layer]):
            assert module.running_mean is not mean
            assert (module.running_mean == 5.0).all()
            replace_statistics(layer, torch.ones(2), torch.ones(2))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert module.running_mean is mean
    assert (mean == 5.0).all()


def test_work_starts_from_finite_values():
    module = nn.BatchNorm1d(3)
    module.running_mean.copy_(torch.tensor([math.nan, 2.0, 2.0]))
    module.running_var.copy_(torch.tensor([4.0, -1.0, 4.0]))
    with prepare_for_calibration(module, find_layers(module)):
        assert module.running_mean.tolist() == [0.0, 0.0, 2.0]
        assert module.running_var.tolist() == [1.0, 1.0, 4.0]
    assert module.running_mean.isnan().any()


def test_perturbed_statistics_differ_in_each_channel_for_a_while():
    module = nn.BatchNorm1d(4)
    (layer,) = find_layers(module)
    with perturb_statistics(layer):
        mean, var = current_statistics(layer)
        assert mean.unique().numel() == var.unique().numel() == 4
    assert (module.running_mean == 0.0).all()


def test_values_take_dtype_and_shape_of_the_buffer_or_are_refused():
    buffer = torch.zeros(1, 2, 1, dtype=torch.float16)
    kept = fit_to_buffer(torch.tensor([1.0, 2.0], dtype=torch.float64), buffer, "bn")
    assert (kept.dtype, kept.shape) == (torch.float16, buffer.shape)
    with pytest.raises(CalibrationError, match=r"bn: the statistics reach 1e\+05, .* in float16"):
        fit_to_buffer(torch.tensor([1.0, 1e5]), buffer, "bn")


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
    assert input_moments(values).is_finite
    values[1, 0, 1, 1] = value
    assert not input_moments(values).is_finite


def test_squares_beyond_float32_are_finite():
    moments = input_moments(torch.randn(50, 2) * 1e30)
    assert moments.is_finite
    assert (moments.var_unbiased > 1e58).all()


def test_either_part_counts():
    good, bad = torch.zeros(2, dtype=torch.float64), torch.tensor([0.0, math.nan])
    assert not Moments(3, bad, good).is_finite
    assert not Moments(3, good, bad).is_finite


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
