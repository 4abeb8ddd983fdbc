"""Standard errors against how far statistics of samples really scatter."""

import pytest
import torch

from bnguard.layers.moments import channel_moments, merge_moments
from bnguard.recalibration.statistics import Pool, is_precise, standard_errors


@pytest.mark.parametrize("is_correlated", [False, True], ids=["independent", "correlated"])
def test_standard_errors_are_those_of_repeated_samples(is_correlated):
    generator = torch.Generator().manual_seed(0)

    def sample():
        values = torch.randn(640, 2, 1, generator=generator).double() * 3.0 + 100.0
        noise = torch.randn(640, 2, 8, generator=generator).double()
        return (values + (0.1 if is_correlated else 3.0) * noise).split(16)

    means, logarithms, errors = [], [], []
    for _ in range(300):
        parts = [channel_moments(part) for part in sample()]
        merged = merge_moments(parts)
        means.append(merged.mean)
        logarithms.append(merged.var_biased.log())
        errors.append(torch.stack(standard_errors(parts)))
    deviation = torch.stack(logarithms).mean(0).exp().sqrt()
    scatter = torch.stack([torch.stack(means).std(0) / deviation, torch.stack(logarithms).std(0)])
    assert torch.allclose(torch.stack(errors).mean(0), scatter, rtol=0.15)


def test_few_parts_are_never_precise():
    parts = [channel_moments(torch.randn(1000, 2)) for _ in range(7)]
    assert not is_precise({0: parts}, tolerance=10.0)
    assert is_precise({0: [*parts, parts[0]]}, tolerance=10.0)
    assert not is_precise({0: [*parts, parts[0]], 1: parts}, tolerance=10.0)


def test_a_pool_keeps_few_parts_and_loses_nothing():
    values = torch.randn(1000, 3)
    pool = Pool()
    for part in values.split(2):
        pool.add({4: [channel_moments(part)]})
    whole = channel_moments(values.double())
    assert len(pool.parts[4]) <= 64
    merged = merge_moments(pool.parts[4])
    assert merged.count == 1000
    assert torch.allclose(merged.mean, whole.mean, atol=1e-6)
    assert torch.allclose(merged.squares, whole.squares, rtol=1e-6)
