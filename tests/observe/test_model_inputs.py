"""Whether batches differ more than independent samples explain, against a naive computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnguard.observe.model_inputs import SampleProbe


def observed(batches):
    probe = SampleProbe()
    for batch in batches:
        probe.note([batch])
        probe.start_step()
    return probe.window()


def test_it_is_the_f_ratio_of_an_analysis_of_variance():
    batches = [torch.randn(16, 3) + index for index in range(5)]
    means = np.stack([batch.double().mean(0).numpy() for batch in batches])
    within = np.stack([batch.double().var(0).numpy() for batch in batches]).mean(0)
    window = observed(batches)
    assert window.batches == 5
    assert window.variance_ratio == pytest.approx(16 * means.var(0, ddof=1) / within, rel=1e-4)


def test_independent_samples_give_one():
    window = observed([torch.randn(32, 1, 8, 8) for _ in range(240)])
    assert np.median(window.variance_ratio) == pytest.approx(1.0, abs=0.1)


def test_numbers_that_never_vary_and_those_that_are_not_finite_are_left_out():
    batches = [torch.randn(8, 4) for _ in range(3)]
    for batch in batches:
        batch[:, 1] = 2.0
        batch[0, 2] = torch.nan
    assert len(observed(batches).variance_ratio) == 2


@pytest.mark.parametrize("batch", [torch.randn(1, 3), torch.randn(8), torch.randn(0, 3)])
def test_inputs_without_samples_are_not_read(batch):
    assert observed([batch] * 4) is None


def test_the_last_window_is_used_until_the_new_one_is_half_full():
    probe = SampleProbe()
    for _ in range(8):
        probe.note([torch.randn(8, 3)])
        probe.start_step()
    probe.start_window()
    probe.note([torch.randn(8, 3)])
    assert probe.window().batches == 8
    for _ in range(4):
        probe.start_step()
        probe.note([torch.randn(8, 3)])
    assert probe.window().batches == 5


def of_means(means):
    """One window of batches of 16 samples with these means."""
    return float(np.median(observed([torch.randn(16, 3) + mean for mean in means]).variance_ratio))


def test_a_slow_trend_does_not_count_as_difference_between_batches():
    assert of_means(torch.linspace(0.0, 2.0, 50)) < 1.7
    assert of_means(torch.linspace(0.0, 1.4, 50).square()) < 1.7
    # Classes in their order, each for some batches.
    assert of_means(torch.arange(50).div(10, rounding_mode="floor") % 3 - 1.0) > 4.0


def in_turn(*streams, steps=40, **options):
    """One window of steps in which the model is given a batch of each stream."""
    probe = SampleProbe(**options)
    for step in range(steps):
        for stream in streams:
            probe.note([stream(step)])
        probe.start_step()
    return float(np.median(probe.window().variance_ratio))


def test_batches_of_one_step_are_compared_with_those_at_their_place():
    def real(step):
        return torch.randn(16, 3)

    def generated(step):
        return 0.1 * torch.randn(32, 3) + 3.0 + step % 5

    def sorted_by_class(step):
        return torch.randn(16, 3) + step // 4 % 3

    assert in_turn(real, generated) == pytest.approx(1.0, abs=0.5)
    assert in_turn(real, generated, generated, real) == pytest.approx(1.0, abs=0.5)
    assert in_turn(sorted_by_class, sorted_by_class) > 3.0
    assert in_turn(real, generated, accumulated_batches=2) > 3.0
    assert in_turn(real, real, real, accumulated_batches=3) == pytest.approx(1.0, abs=0.5)
