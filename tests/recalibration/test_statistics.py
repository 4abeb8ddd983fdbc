"""Statistics that a calibration writes to, in place of the model's own."""

import math

import pytest
import torch
from torch import nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import find_layers
from bnguard.recalibration.replay import perturb_statistics
from bnguard.recalibration.statistics import (
    current_statistics,
    fit_to_buffer,
    prepare_for_calibration,
    write_statistics,
)


@pytest.mark.parametrize("fails", [False, True])
def test_the_tensors_of_the_model_are_restored_unchanged(fails):
    module = nn.BatchNorm1d(2)
    module.running_mean.fill_(5.0)
    (layer,), mean = find_layers(module), module.running_mean
    try:
        with prepare_for_calibration(module, [layer]):
            assert module.running_mean is not mean
            assert (module.running_mean == 5.0).all()
            write_statistics(layer, torch.ones(2), torch.ones(2))
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
