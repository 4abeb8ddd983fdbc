"""What the buffers told, against a naive float64 record of every batch."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from bnguard.layers import find_layers
from bnguard.probes.buffers import BufferProbe


class Oracle:
    """Records, in float64, the statistics of every batch that reaches a layer in train mode."""

    def __init__(self, layer: nn.Module) -> None:
        self.means: list[np.ndarray] = []
        self.variances: list[np.ndarray] = []
        layer.register_forward_pre_hook(self.record)

    def record(self, layer, args):
        if layer.training:
            rows = args[0].detach().double().movedim(1, 0).flatten(1).numpy()
            self.means.append(rows.mean(1))
            self.variances.append(rows.var(1, ddof=1))


def near(measured, expected, scale=None):
    """Within 1e-4 of the expected value, or of its natural scale where it is near zero."""
    scale = np.abs(expected) if scale is None else scale
    assert np.all(np.abs(measured - expected) <= 1e-4 * np.maximum(scale, np.abs(expected)))


def check_window(window, oracle):
    means, variances = np.array(oracle.means), np.array(oracle.variances)
    deviation = np.sqrt(variances.mean(0))
    near(window.mean, means.mean(0), deviation)
    near(window.var_unbiased, variances.mean(0))
    near(window.var_min, variances.min(0), variances.mean(0))
    near(window.var_max, variances.max(0))
    assert np.all(window.batches == len(means))
    if len(means) > 1:
        variance_scale = variances.mean(0)
        near(window.var_of_means, means.var(0, ddof=1), variance_scale)
        near(
            window.var_of_means_successive,
            (np.diff(means, axis=0) ** 2).mean(0) / 2,
            variance_scale,
        )


@given(
    momentum=st.sampled_from([None, 0.05, 0.1, 0.3, 1.0]),
    steps=st.integers(1, 12),
    channels=st.integers(1, 7),
    batch=st.integers(2, 9),
    offset=st.sampled_from([0.0, 1.0, 5.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_window_is_that_of_a_float64_record(momentum, steps, channels, batch, offset, dtype):
    first, second = nn.BatchNorm1d(channels, momentum=momentum), nn.BatchNorm2d(channels)
    model = nn.ModuleList([first, second]).to(dtype)
    oracles = [Oracle(first), Oracle(second)]
    probe = BufferProbe(find_layers(model))
    for step in range(steps):
        first(torch.randn(batch, channels, dtype=dtype) + offset)
        second(torch.randn(batch, channels, 3, 2, dtype=dtype) * 2 + step)
        probe.read(step)
    readings = probe.readings()
    for name, oracle in zip(("0", "1"), oracles, strict=True):
        check_window(readings[name].window, oracle)
        assert readings[name].updates == steps
        assert readings[name].running.updates == steps


def test_a_new_window_forgets_the_old_one():
    layer = nn.BatchNorm1d(3)
    probe = BufferProbe(find_layers(layer))
    for step in range(3):
        layer(torch.randn(8, 3) + 100)
        probe.read(step)
    probe.start_window()
    assert probe.readings()[""].window is None
    oracle = Oracle(layer)
    for step in range(3, 6):
        layer(torch.randn(8, 3))
        probe.read(step)
    reading = probe.readings()[""]
    # The mean before was 100: what float32 buffers tell of the first batch after is less exact.
    assert np.allclose(reading.window.mean, np.mean(oracle.means, axis=0), atol=1e-3)
    assert (reading.window.first_step, reading.window.last_step) == (3, 5)
    assert reading.updates == 6


def test_several_forwards_in_a_step_give_the_blend_that_torch_made():
    layer = nn.BatchNorm1d(2, momentum=0.2).double()
    oracle = Oracle(layer)
    probe = BufferProbe(find_layers(layer))
    for _ in range(3):
        layer(torch.randn(5, 2).double())
    probe.read(1)
    weights = 0.2 * 0.8 ** np.array([2, 1, 0]) / (1 - 0.8**3)
    reading = probe.readings()[""]
    near(reading.window.mean, weights @ np.array(oracle.means))
    near(reading.window.var_unbiased, weights @ np.array(oracle.variances))
    assert reading.updates == 3


def test_a_step_without_a_batch_adds_nothing():
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    probe = BufferProbe(find_layers(model))
    model[0](torch.randn(4, 2))
    probe.read(1)
    readings = probe.readings()
    assert readings["0"].updates == 1
    assert readings["1"].updates == 0
    assert readings["1"].window is None


def test_momentum_zero_tells_nothing_and_breaks_nothing():
    layer = nn.BatchNorm1d(2, momentum=0.0)
    probe = BufferProbe(find_layers(layer))
    layer(torch.randn(4, 2))
    probe.read(1)
    assert probe.readings()[""].window is None


def test_momentum_that_changes_in_training_is_followed():
    layer = nn.BatchNorm1d(2).double()
    oracle = Oracle(layer)
    probe = BufferProbe(find_layers(layer))
    for step, momentum in enumerate([0.1, 0.5, None, 0.01]):
        layer.momentum = momentum
        layer(torch.randn(6, 2).double())
        probe.read(step)
    check_window(probe.readings()[""].window, oracle)


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: model.double(),
        lambda model: model.load_state_dict(
            {key: value.clone() for key, value in model.state_dict().items()}, assign=True
        ),
    ],
)
def test_buffers_that_are_replaced_are_read_from_then_on(replace):
    model = nn.Sequential(nn.BatchNorm1d(3))
    probe = BufferProbe(find_layers(model))
    for step in range(2):
        model(torch.randn(4, 3))
        probe.read(step)
    replace(model)
    values = torch.randn(4, 3).to(model[0].running_mean.dtype)
    model(values)
    probe.read(2)  # which only notices the new buffers
    oracle = Oracle(model[0])
    for step in range(3, 5):
        model(torch.randn(4, 3).to(values.dtype))
        probe.read(step)
    check_window(probe.readings()["0"].window, oracle)


def test_statistics_loaded_in_between_are_no_batch():
    layer = nn.BatchNorm1d(3)
    probe = BufferProbe(find_layers(layer))
    with torch.no_grad():
        layer.running_mean.fill_(50.0)
    probe.forget_changes()
    oracle = Oracle(layer)
    layer(torch.randn(4, 3))
    probe.read(1)
    assert np.allclose(probe.readings()[""].window.mean, oracle.means[0], atol=1e-4)


def test_a_poisoned_channel_is_dated_and_keeps_out_of_the_window():
    layer = nn.BatchNorm1d(3)
    oracle = Oracle(layer)
    probe = BufferProbe(find_layers(layer))
    for step in range(1, 6):
        values = torch.randn(6, 3)
        if step == 3:
            values[0, 1] = math.nan
        layer(values)
        probe.read(step)
    reading = probe.readings()[""]
    assert reading.running.bad_channels == (1,)
    assert reading.poisoned_step == 3
    assert list(reading.window.batches) == [5, 2, 5]
    assert np.allclose(
        reading.window.mean[[0, 2]], np.mean(oracle.means, axis=0)[[0, 2]], atol=1e-5
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_poisoned_statistics_are_put_back_in_the_same_step(bad):
    layer = nn.BatchNorm1d(3)
    probe = BufferProbe(find_layers(layer), restore_poisoned=True)
    layer(torch.randn(6, 3))
    probe.read(1)
    before = copy.deepcopy(layer.state_dict())
    values = torch.randn(6, 3)
    values[0, 1] = bad
    layer(values)
    probe.read(2)
    for name in ("running_mean", "running_var"):
        restored = getattr(layer, name)
        assert restored.isfinite().all()
        assert restored[1] == before[name][1]
        assert restored[0] != before[name][0]
    reading = probe.readings()[""]
    assert (reading.poisoned_step, reading.restored_updates) == (2, 1)


def test_putting_back_does_not_disturb_a_backward_that_comes_later():
    layer = nn.BatchNorm1d(3)
    probe = BufferProbe(find_layers(layer), restore_poisoned=True)
    values = torch.randn(6, 3)
    values[0, 1] = math.nan
    loss = layer(values).nan_to_num().sum()
    probe.read(1)
    loss.backward()


def test_statistics_that_were_bad_before_watching_stay_as_they_are():
    layer = nn.BatchNorm1d(2)
    layer.running_mean[0] = math.nan
    probe = BufferProbe(find_layers(layer), restore_poisoned=True)
    layer(torch.randn(4, 2))
    probe.read(1)
    reading = probe.readings()[""]
    assert reading.running.bad_channels == (0,)
    assert reading.restored_updates == 0


def test_layers_without_running_statistics_are_left_out():
    model = nn.ModuleList([nn.BatchNorm1d(2, track_running_stats=False), nn.LazyBatchNorm1d()])
    probe = BufferProbe(find_layers(model))
    probe.read(1)
    assert probe.readings() == {}
