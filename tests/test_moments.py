"""Moments against a naive float64 computation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from bnguard.moments import Moments, channel_moments, merge_moments, values_per_channel


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
    assert_close(moments.mean, mean, rtol=1e-7, atol=0)
    assert_close(moments.var_unbiased, var, rtol=1e-3, atol=0)


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
