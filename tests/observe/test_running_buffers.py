"""What the buffers told, against a naive float64 record of every batch."""

from __future__ import annotations

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bnguard.layers.bn_layer import find_layers
from bnguard.observe.batch_statistics import BatchProbe
from tests.observe.oracle import Oracle, check_window, near

LAYERS = {
    nn.BatchNorm1d: (),
    nn.BatchNorm2d: (3, 2),
    nn.BatchNorm3d: (2, 1, 3),
    nn.SyncBatchNorm: (4,),
}


@st.composite
def random_layers(draw):
    """Layers of every kind, each with settings of its own, and the batches that they meet."""
    kinds = draw(st.lists(st.sampled_from(list(LAYERS)), min_size=1, max_size=5))
    layers = nn.ModuleList()
    for kind in kinds:
        channels = draw(st.integers(1, 7))
        momentum = draw(st.sampled_from([None, 0.05, 0.1, 0.3, 1.0]))
        layers.append(kind(channels, momentum=momentum, affine=draw(st.booleans())))
    steps = draw(
        st.lists(
            st.lists(st.booleans(), min_size=len(kinds), max_size=len(kinds)),
            min_size=1,
            max_size=9,
        )
    )
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    return layers.to(dtype), steps, dtype, draw(st.sampled_from([0.0, 1.0, 5.0]))


@given(drawn=random_layers(), batch=st.integers(2, 9), seed=st.integers(0, 2**31))
@settings(max_examples=100)
def test_windows_are_those_of_a_float64_record(drawn, batch, seed):
    """Each layer is called in some of the steps, in others not."""
    torch.manual_seed(seed)
    layers, steps, dtype, offset = drawn
    oracles = [Oracle(layer) for layer in layers]
    probe = BatchProbe(find_layers(layers))
    for step, are_called in enumerate(steps):
        for layer, is_called in zip(layers, are_called, strict=True):
            if is_called:
                shape = (batch, layer.num_features, *LAYERS[type(layer)])
                layer(torch.randn(shape, dtype=dtype) * 2 + offset + step)
        probe.read(step)
    readings = probe.readings()
    for index, oracle in enumerate(oracles):
        reading = readings[str(index)]
        assert reading.updates == reading.running.updates == len(oracle.means)
        if oracle.means:
            check_window(reading.window, oracle)
        else:
            assert reading.window is None


@given(
    rises=st.lists(st.integers(0, 4), min_size=1, max_size=8),
    momentum=st.sampled_from([None, 0.1, 0.3]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_a_step_of_k_batches_gives_the_blend_that_torch_made(rises, momentum, seed):
    torch.manual_seed(seed)
    layer = nn.BatchNorm1d(3, momentum=momentum).double()
    oracle = Oracle(layer)
    probe = BatchProbe(find_layers(layer))
    means, variances = [], []
    for step, k in enumerate(rises):
        for _ in range(k):
            layer(torch.randn(5, 3).double())
        probe.read(step)
        if k:
            kept = 1.0 if momentum is None else 1.0 - momentum
            weights = kept ** np.arange(k)[::-1]
            weights /= weights.sum()
            means.append(weights @ np.array(oracle.means[-k:]))
            variances.append(weights @ np.array(oracle.variances[-k:]))
    reading = probe.readings()[""]
    assert reading.updates == sum(rises)
    if means:
        near(reading.window.mean, np.mean(means, axis=0), 1e-6)
        near(reading.window.var_unbiased, np.mean(variances, axis=0), 1e-6)
        near(reading.window.var_max, np.max(variances, axis=0), 1e-6)


@pytest.mark.parametrize("momentum", [None, 0.1, 0.5])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_the_spread_of_blends_is_scaled_to_that_of_single_batches(momentum, k):
    """Means of 4 values of variance 1 have variance 1/4, however many are blended in a step."""
    layer = nn.BatchNorm1d(400, momentum=momentum).double()
    probe = BatchProbe(find_layers(layer))
    for step in range(40):
        for _ in range(k):
            layer(torch.randn(4, 400).double())
        probe.read(step)
    window = probe.readings()[""].window
    assert abs(window.var_of_means.mean() - 0.25) < 0.012
    assert abs(window.var_of_means_successive.mean() - 0.25) < 0.012


@pytest.mark.parametrize("momentum", [None, 0.1, 0.5])
def test_batches_that_are_met_twice_are_no_blend_of_two(momentum):
    layer = nn.BatchNorm1d(400, momentum=momentum).double()
    probe = BatchProbe(find_layers(layer))
    probe.choose_sources({"": 2})
    for step in range(40):
        batch = torch.randn(4, 400).double()
        layer(batch)
        layer(batch)
        probe.read(step)
    window = probe.readings()[""].window
    assert abs(window.var_of_means.mean() - 0.25) < 0.012


def test_a_new_window_forgets_the_old_one():
    layer = nn.BatchNorm1d(3)
    probe = BatchProbe(find_layers(layer))
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
    assert reading.window.batches.tolist() == [3.0] * 3
    assert reading.updates == 6


def test_a_step_without_a_batch_adds_nothing():
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    probe = BatchProbe(find_layers(model))
    model[0](torch.randn(4, 2))
    probe.read(1)
    readings = probe.readings()
    assert readings["0"].updates == 1
    assert readings["1"].updates == 0
    assert readings["1"].window is None


def test_momentum_zero_tells_nothing_and_breaks_nothing():
    layer = nn.BatchNorm1d(2, momentum=0.0)
    probe = BatchProbe(find_layers(layer))
    layer(torch.randn(4, 2))
    probe.read(1)
    assert probe.readings()[""].window is None


def test_momentum_that_changes_in_training_is_followed():
    layer = nn.BatchNorm1d(2).double()
    oracle = Oracle(layer)
    probe = BatchProbe(find_layers(layer))
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
    probe = BatchProbe(find_layers(model))
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
    probe = BatchProbe(find_layers(layer))
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
    probe = BatchProbe(find_layers(layer))
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
def test_poisoned_statistics_are_restored_in_the_same_step(bad):
    layer = nn.BatchNorm1d(3)
    probe = BatchProbe(find_layers(layer), restore_poisoned=True)
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
    probe = BatchProbe(find_layers(layer), restore_poisoned=True)
    values = torch.randn(6, 3)
    values[0, 1] = math.nan
    loss = layer(values).nan_to_num().sum()
    probe.read(1)
    loss.backward()


def test_statistics_that_were_bad_before_watching_stay_as_they_are():
    layer = nn.BatchNorm1d(2)
    layer.running_mean[0] = math.nan
    probe = BatchProbe(find_layers(layer), restore_poisoned=True)
    layer(torch.randn(4, 2))
    probe.read(1)
    reading = probe.readings()[""]
    assert reading.running.bad_channels == (0,)
    assert reading.restored_updates == 0


def test_layers_without_running_statistics_are_left_out():
    model = nn.ModuleList([nn.BatchNorm1d(2, track_running_stats=False), nn.LazyBatchNorm1d()])
    probe = BatchProbe(find_layers(model))
    probe.read(1)
    assert probe.readings() == {}


def test_nothing_waits_for_the_device_between_readings():
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(2, momentum=None)])
    probe = BatchProbe(find_layers(model))
    with Waiting() as waiting:
        for step in range(70):
            for layer in model:
                layer(torch.randn(4, layer.num_features))
            with waiting.watched():
                probe.read(step)
    # On a CPU two looks a turn are allowed, which cost nothing there: is everything finite, and
    # are the weights the same?
    assert set(waiting.seen) <= {"aten._local_scalar_dense.default"}
    assert len(waiting.seen) <= 2 * (70 / 32 + 1)


class Waiting(TorchDispatchMode):
    """Notes the operations that would make the host wait for an accelerator."""

    names = ("_local_scalar_dense", "nonzero", "equal.", "masked_select", "unique")

    def __init__(self):
        super().__init__()
        self.seen = []
        self.is_watching = False

    @contextlib.contextmanager
    def watched(self):
        self.is_watching = True
        yield
        self.is_watching = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.is_watching and any(name in str(function) for name in self.names):
            self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_layers_on_several_devices_and_dtypes_are_read_apart():
    model = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(2).double(), nn.BatchNorm1d(4)])
    model[2].to("meta")
    oracles = [Oracle(layer) for layer in model]
    probe = BatchProbe(find_layers(model))
    for step in range(4):
        model[0](torch.randn(4, 3))
        model[1](torch.randn(4, 2).double())
        probe.read(step)
    readings = probe.readings()
    assert set(readings) == {"0", "1"}
    check_window(readings["0"].window, oracles[0])
    check_window(readings["1"].window, oracles[1])


def test_half_precision_buffers_are_watched_for_poison_all_the_same():
    layer = nn.BatchNorm1d(3).bfloat16()
    probe = BatchProbe(find_layers(layer))
    layer(torch.randn(4, 3).bfloat16())
    probe.read(1)
    layer(torch.full((4, 3), math.inf).bfloat16())
    probe.read(2)
    assert probe.readings()[""].poisoned_step == 2


def test_a_layer_of_another_width_in_the_same_place_begins_anew():
    model = nn.Sequential(nn.BatchNorm1d(3))
    probe = BatchProbe(find_layers(model))
    model(torch.randn(4, 3))
    probe.read(1)
    model[0] = nn.BatchNorm1d(5)
    probe.follow(find_layers(model))
    reading = probe.readings()["0"]
    assert reading.window is None
    assert reading.updates == 0
    assert len(reading.running.mean) == 5
