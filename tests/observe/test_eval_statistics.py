"""Eval statistics against a naive float64 record."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnguard.layers.bn_layer import find_layers
from bnguard.observe.eval_statistics import EvalProbe


def window(model, batches, first_blocks=8, mode=torch.no_grad):
    probe = EvalProbe(model, find_layers(model), first_blocks)
    with mode():
        for batch in batches:
            model(batch)
    probe.hooks.close()
    (result,) = probe.windows(step=1).values()
    return result


SHAPES = {nn.BatchNorm1d: (), nn.BatchNorm2d: (3, 2), nn.BatchNorm3d: (2, 1, 3)}


@given(
    kind=st.sampled_from(list(SHAPES)),
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) > 1),
    channels=st.integers(1, 5),
    offset=st.sampled_from([0.0, 5.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=100)
def test_moments_and_extremes_are_those_of_all_values_together(
    kind, sizes, channels, offset, dtype, seed
):
    torch.manual_seed(seed)
    layer = kind(channels).to(dtype).eval()
    layer.running_mean.normal_().add_(offset)
    layer.running_var.uniform_(0.5, 2.0)
    shape = (channels, *SHAPES[kind])
    batches = [torch.randn(size, *shape, dtype=dtype) + offset for size in sizes]
    result = window(layer, batches)
    rows = torch.cat(batches).double().movedim(1, 0).flatten(1)
    assert result.count == rows.shape[1]
    assert result.batches == len(sizes)
    mean, var = rows.mean(1), rows.var(1)
    torch.testing.assert_close(torch.from_numpy(result.mean), mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(result.var_unbiased), var, rtol=1e-4, atol=1e-6)
    deviation = (layer.running_var.double() + layer.eps).sqrt()
    extreme = ((rows - layer.running_mean.double()[:, None]).abs() / deviation[:, None]).max()
    assert result.largest_normalised_std == pytest.approx(extreme.item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_images_are_read_exactly(layout):
    x = (torch.randn(8, 3, 512, 512) + 1.0).contiguous(memory_format=layout)
    result = window(nn.BatchNorm2d(3).eval(), x.split(4))
    rows = x.double().movedim(1, 0).flatten(1)
    np.testing.assert_allclose(result.mean, rows.mean(1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(result.var_unbiased, rows.var(1), rtol=1e-5)


def test_after_the_first_calls_fewer_and_fewer_are_read():
    batches = [torch.randn(32, 2) for _ in range(13)]
    result = window(nn.BatchNorm1d(2).eval(), batches, first_blocks=3)
    assert result.batches == 5
    read = [batches[call - 1] for call in (1, 2, 3, 6, 12)]
    expected = torch.cat(read).double().mean(0)
    torch.testing.assert_close(torch.from_numpy(result.mean), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 8, 32, 256])
@pytest.mark.parametrize("shape", [(2,), (2, 3, 3)])
def test_small_batches_give_as_many_values_as_large_ones(size, shape):
    samples = torch.randn(1024, *shape)
    layer = nn.BatchNorm1d(2) if len(shape) == 1 else nn.BatchNorm2d(2)
    result = window(layer.eval(), samples.split(size))
    assert result.count >= 8 * 32 * samples[0, 0].numel()
    assert result.batches >= min(8, 1024 // size)


@pytest.mark.parametrize("size", [1, 8, 32])
def test_a_sorted_evaluation_shows_at_any_batch_size(size):
    samples = torch.randn(512, 3).sort(0).values
    result = window(nn.BatchNorm1d(3).eval(), samples.split(size))
    assert result.is_between_shown
    assert result.between_share > 0.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_call_with_nan_is_counted_but_does_not_enter_the_moments(bad):
    layer = nn.BatchNorm1d(2).eval()
    good, spoilt = torch.randn(4, 2), torch.randn(4, 2)
    spoilt[1, 1] = bad
    result = window(layer, [good, spoilt])
    assert (result.batches, result.nonfinite_batches, result.count) == (2, 1, 4)
    torch.testing.assert_close(
        torch.from_numpy(result.mean), good.double().mean(0), rtol=1e-5, atol=1e-6
    )
    assert np.isfinite(result.largest_normalised_std)


def test_the_share_of_padding_and_its_spread():
    layer = nn.BatchNorm1d(3).eval()
    values = torch.randn(2, 3, 10)
    values[0, :, 6:] = 0.0
    result = window(layer, [values])
    assert result.padding_share == pytest.approx(0.2)
    assert result.padding_spread == pytest.approx(0.2)


def test_padding_at_two_sides_of_an_image_is_a_share_of_its_area():
    values = torch.randn(1, 2, 8, 8)
    values[..., 4:] = 0.0
    values[:, :, 6:] = 0.0
    result = window(nn.BatchNorm2d(2).eval(), [values])
    assert result.padding_share == pytest.approx(1 - 0.5 * 0.75)


def test_a_dark_background_is_not_padding():
    values = torch.zeros(4, 2, 8, 8)
    values[:, :, 2:6, 3:5] = torch.randn(4, 2, 4, 2)
    assert window(nn.BatchNorm2d(2).eval(), [values]).padding_share == 0.0


def test_repeated_values_are_not_padding():
    letters = torch.randint(0, 4, (64, 100))
    values = nn.functional.one_hot(letters, 4).float().transpose(1, 2)
    assert window(nn.BatchNorm1d(4).eval(), [values]).padding_share < 0.05


def test_images_without_padding_have_none():
    result = window(nn.BatchNorm2d(3).eval(), [torch.randn(4, 3, 5, 5)])
    assert result.padding_share == result.padding_spread == 0.0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_and_in_every_grad_mode(mode, dtype):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)).eval()
    images = torch.randn(4, 1, 8, 8)
    with torch.autocast("cpu", dtype):
        result = window(model, [images], mode=mode)
        with torch.no_grad():
            rows = model[0](images).double().movedim(1, 0).flatten(1)
    assert result.dtype == str(dtype).removeprefix("torch.")
    torch.testing.assert_close(torch.from_numpy(result.mean), rows.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.from_numpy(result.var_unbiased), rows.var(1), rtol=1e-4, atol=1e-5
    )


def test_a_layer_in_train_mode_is_not_read():
    probe = EvalProbe(layer := nn.BatchNorm1d(2), find_layers(layer), 8)
    layer(torch.randn(4, 2))
    assert probe.windows(step=1) == {}


@pytest.mark.parametrize(("size", "is_sorted", "shown"), [
    (2, False, (0, 5)),
    (16, False, (0, 5)),
    (16, True, (95, 100)),
])  # fmt: skip
def test_sorted_data_are_significant_and_chance_is_not(size, is_sorted, shown):
    """One channel, so that a median over channels cannot make up for a false limit."""
    torch.manual_seed(0)
    found = 0
    for _ in range(100):
        samples = torch.randn(8 * size)
        batches = (samples.sort().values if is_sorted else samples).reshape(8, size, 1)
        found += window(nn.BatchNorm1d(1).eval(), batches).is_between_shown
    low, high = shown
    assert low <= found <= high


def test_dropout_is_noted_at_the_next_layer():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.BatchNorm1d(4) for _ in range(3))
            self.none, self.drop, self.head = nn.Dropout(0.0), nn.Dropout(0.3), nn.Dropout(0.5)

        def forward(self, x):
            return self.head(self.third(self.second(self.drop(self.first(self.none(x))))))

    model = Network().eval()
    probe = EvalProbe(model, find_layers(model), 8)
    for _ in range(2):
        model(torch.randn(8, 4))
    before = {name: window.dropout_before for name, window in probe.windows(1).items()}
    assert before == {"first": "", "second": "Dropout", "third": ""}
