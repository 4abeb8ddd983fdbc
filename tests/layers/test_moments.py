"""Moments against a naive float64 computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bnguard.layers.moments import Moments, channel_moments, merge_moments, values_per_channel


def naive(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = values.double().movedim(1, 0).flatten(1)
    return rows.mean(1), rows.var(1)


@pytest.mark.parametrize("shape", [(7, 3), (5, 3, 4), (4, 2, 5, 6), (2, 3, 4, 5, 6), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_moments_are_those_of_float64(shape, dtype):
    values = (torch.randn(shape) * 2 + 1).to(dtype)
    moments = channel_moments(values)
    mean, var = naive(values)
    assert moments.count == values_per_channel(values.shape)
    assert_close(moments.mean, mean, rtol=1e-5, atol=1e-6)
    assert_close(moments.var_unbiased, var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_large_mean_hides_no_small_deviation(layout):
    values = (torch.randn(16, 4, 8, 8).double() * 0.01 + 1e4).float()
    moments = channel_moments(values.contiguous(memory_format=layout))
    mean, var = naive(values)
    assert_close(moments.mean, mean, rtol=1e-9, atol=0)
    assert_close(moments.var_unbiased, var, rtol=1e-5, atol=0)


def spread_out(layout, dtype, mean):
    """Return 1e8 values of two channels in little memory, and the same moments in a few values."""
    few = (torch.randn(1, 2, 500, 1000) + mean).to(dtype)
    few = few.contiguous(memory_format=getattr(torch, layout))
    return few.expand(200, -1, -1, -1), few


@pytest.mark.parametrize("mean", [0.0, 3.5, 50.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last"])
def test_the_error_does_not_grow_with_the_number_of_values(layout, dtype, mean):
    values, few = spread_out(layout, dtype, mean)
    moments = channel_moments(values)
    exact_mean, exact_var = naive(few)
    exact_var *= (few[0, 0].numel() - 1) / few[0, 0].numel()
    assert moments.count == 10**8
    assert ((moments.mean - exact_mean).abs() / exact_var.sqrt()).max() < 1e-5
    assert_close(moments.var_biased, exact_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 300, 300, 300),  # one sample that has to be cut within itself
        (2, 1, 1500, 2001),  # one channel
        (300_001, 3),
        (3, 5, 100_003),
        (8192, 70, 1, 3),
    ],
)
@pytest.mark.parametrize("order", ["rows", "interleaved", "mixed"])
def test_every_shape_and_layout_is_exact(shape, order):
    values = torch.randn(shape) * torch.linspace(0.1, 10.0, shape[1]).view(
        -1, *[1] * len(shape[2:])
    )
    values += 2.0
    if order == "interleaved":
        values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    elif order == "mixed":
        values = values.transpose(0, -1).contiguous().transpose(0, -1)
    mean, var = naive(values)
    moments = channel_moments(values)
    assert ((moments.mean - mean).abs() / var.sqrt()).max() < 1e-5
    assert_close(moments.var_unbiased, var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_constant_values_have_no_variance(layout):
    values = torch.full((4, 3, 100, 100), 1000.1).contiguous(memory_format=layout)
    moments = channel_moments(values)
    assert moments.squares.eq(0).all()
    assert_close(moments.mean, values[0, :, 0, 0].double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_mean_of_1e5_deviations_is_exact_for_what_float32_holds(layout):
    values = (torch.randn(4, 3, 256, 256).double() * 0.01 + 1000.0).float()
    moments = channel_moments(values.contiguous(memory_format=layout))
    mean, var = naive(values)
    assert ((moments.mean - mean).abs() / var.sqrt()).max() < 1e-5
    assert_close(moments.var_unbiased, var, rtol=1e-5, atol=0)


@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(lambda sizes: sum(sizes) > 1),
    offset=st.sampled_from([0.0, 1.0, 1e3]),
)
@settings(max_examples=60)
def test_merged_parts_are_the_whole(sizes, offset):
    parts = [torch.randn(size, 3, 2, dtype=torch.float64) + offset + size for size in sizes]
    merged = merge_moments(map(channel_moments, parts))
    mean, var = naive(torch.cat(parts))
    assert merged.count == 2 * sum(sizes)
    assert_close(merged.mean, mean, rtol=1e-12, atol=1e-12)
    assert_close(merged.var_unbiased, var, rtol=1e-9, atol=1e-9)


def test_one_value_has_no_unbiased_variance():
    moments = channel_moments(torch.ones(1, 2))
    assert moments.var_unbiased.isnan().all()
    assert moments.var_biased.eq(0).all()


def test_nothing_cannot_be_merged():
    with pytest.raises(ValueError, match="no moments"):
        merge_moments([])


def test_an_empty_batch_counts_for_nothing():
    filled = channel_moments(torch.tensor([[1.0], [3.0]]))
    empty = channel_moments(torch.empty(0, 1))
    assert empty.count == 0
    for parts in ([filled, empty], [empty, filled]):
        merged = merge_moments(parts)
        assert isinstance(merged, Moments)
        assert (merged.count, merged.mean.item(), merged.squares.item()) == (2, 2.0, 2.0)
