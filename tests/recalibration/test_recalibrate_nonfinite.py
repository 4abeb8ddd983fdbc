"""Batches with NaN or Inf: left out of every layer and counted, or refused by number."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn

import bnguard
from bnguard.errors import CalibrationError
from tests.benchmarks.truth import errors, true_statistics


def net():
    return nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 6), nn.Hardtanh(-3, 3), nn.BatchNorm1d(6), nn.BatchNorm1d(6)
    )


class BadInside(nn.Module):
    """Gives NaN below its first layer, for samples that begin with 7."""

    def __init__(self, before=1, value=float("nan")):
        super().__init__()
        self.net = net()
        self.before, self.value = before, value

    def forward(self, x):
        is_bad = (x[:, 0] == 7.0).unsqueeze(1)
        y = self.net[: self.before](x)
        return self.net[self.before :](torch.where(is_bad, self.value, y))


def batches_with(bad, size=3, value=float("nan")):
    batches = list(torch.randn(60, 4).split(size))
    for index in bad:
        batches[index][1, 0] = value
    return batches


@pytest.mark.parametrize("method", ["exact", "precise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [3, 30])
def test_bad_input_leaves_its_whole_batch_out(method, value, size):
    bad = (0,) if size == 30 else (2, 7)
    model, batches = net(), batches_with(bad, size, value)
    good = [batch for index, batch in enumerate(batches) if index not in bad]
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=rf"{len(bad)} batch\w* left out for NaN or Inf"):
        result = bnguard.recalibrate(model, batches, method=method)
    assert (result.left_out, result.batches) == (len(bad), len(good))
    assert result.samples == 60 - len(bad) * size
    bnguard.recalibrate(twin, good, method=method)
    for mine, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6)


@pytest.mark.parametrize("before", [1, 3, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_values_that_arise_deep_inside_leave_the_batch_out_of_every_layer(before, value):
    model, batches = BadInside(before, value), batches_with((2, 7), value=7.0)
    good = [batch for index, batch in enumerate(batches) if index not in (2, 7)]
    truth = true_statistics(copy.deepcopy(model).double(), [batch.double() for batch in good])
    with pytest.warns(UserWarning, match="2 batches left out"):
        result = bnguard.recalibrate(model, batches)
    assert max(errors(result, truth)) < 1e-5
    assert "2 batches left out for NaN or Inf (18 used)" in result.notes


def test_bad_batches_are_left_out_of_irregular_models_too():
    class Twice(BadInside):
        def forward(self, x):
            return super().forward(x) + super().forward(x * 2.0)

    model, batches = Twice(1), batches_with((4,), value=7.0)
    good = [batch for index, batch in enumerate(batches) if index != 4]
    truth = true_statistics(copy.deepcopy(model).double(), [batch.double() for batch in good])
    with pytest.warns(UserWarning, match="1 batch left out"):
        result = bnguard.recalibrate(model, batches)
    assert max(errors(result, truth)) < 1e-5


@pytest.mark.parametrize("method", ["exact", "precise"])
@pytest.mark.parametrize("model", [net(), BadInside(3)], ids=["input", "inside"])
def test_it_can_be_an_error_that_names_batch_and_layer(method, model):
    value = 7.0 if isinstance(model, BadInside) else float("nan")
    before = copy.deepcopy(model.state_dict())
    layer = r"net\.3" if isinstance(model, BadInside) else "layer 0"
    with pytest.raises(CalibrationError, match=f"batch 7 has .* in the inputs of {layer}:"):
        bnguard.recalibrate(
            model, batches_with((7,), value=value), method=method, on_nonfinite="error"
        )
    assert all(torch.equal(before[key], after) for key, after in model.state_dict().items())


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_when_all_batches_are_bad(method):
    with pytest.raises(CalibrationError, match=r"in every batch|every batch brings NaN"):
        bnguard.recalibrate(net(), batches_with(range(20)), method=method)


def test_weights_that_are_not_finite():
    model = net()
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"of layer 3 in every batch: fix .* the weights"):
        bnguard.recalibrate(model, batches_with(()))


def test_kept_statistics_that_are_poisoned():
    model = net()
    model[0].running_var.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"layer 3 in every batch: .* statistics of layers"):
        bnguard.recalibrate(model, batches_with(()), layers=["3", "4"])


def test_a_clean_run_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bnguard.recalibrate(net(), batches_with(())).left_out == 0


def test_the_mode_gap_is_measured_on_finite_rows():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), torch.randn(64, 4)
    bad = x[:8] * float("inf")
    with pytest.warns(UserWarning, match="1 batch left out"):
        result = bnguard.recalibrate(model, [*x.split(8), bad], progress=False)
    assert math.isfinite(result.mode_gap_before.relative_change)
    assert math.isfinite(result.mode_gap_after.relative_change)
