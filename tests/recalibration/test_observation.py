"""Observing one batch in a model, and comparing two observations."""

import threading

import pytest
import torch
from torch import nn

from bnguard.layers.moments import channel_moments
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.trial_forward import (
    Witness,
    find_differing_layers,
    observe,
)
from tests.recalibration.jobs import job_of


class Model(nn.Module):
    """Calls its second layer twice, draws noise, and may use a thread."""

    def __init__(self, *, in_thread=False):
        super().__init__()
        self.first, self.second, self.unused = (nn.BatchNorm1d(4) for _ in range(3))
        self.in_thread = in_thread

    def forward(self, x):
        x = self.second(self.first(x)) + torch.rand(1)
        if self.in_thread:
            thread = threading.Thread(target=self.second, args=(x,))
            thread.start()
            thread.join()
            return x
        return self.second(x)


def observed(model, x, index=3):
    with torch.no_grad():
        return observe(job_of(model), Batch(index, (x,), {}, len(x)))


def test_calls_and_moments_of_all_calls_together():
    model, x = Model(), torch.randn(20, 4)
    seen = observed(model, x)
    assert seen.calls == (0, 1, 1)
    assert set(seen.moments) == {0, 1}
    assert (seen.moments[0].count, seen.moments[1].count) == (20, 40)
    assert not seen.starts_threads
    assert observed(Model(in_thread=True), x).starts_threads


def test_a_batch_draws_the_same_random_numbers_each_time_and_leaves_the_global_ones():
    model, x = Model(), torch.randn(20, 4)
    state = torch.get_rng_state()
    first, again, other = observed(model, x), observed(model, x), observed(model, x, index=4)
    assert torch.equal(first.moments[1].mean, again.moments[1].mean)
    assert not torch.equal(first.moments[1].mean, other.moments[1].mean)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("change", "differs"), [(0.0, False), (0.04, False), (0.06, True)])
def test_layers_differ_by_more_than_a_share_of_their_spread(change, differs):
    x = torch.randn(100, 4)
    first, second = ({0: channel_moments(x)}, {0: channel_moments(x + change * x.std())})
    assert find_differing_layers(first, second, 0.05, 1e-6) == ({0} if differs else set())
    assert find_differing_layers(first, {}, 0.05, 1e-6) == {0}


@pytest.mark.parametrize(("change", "differs"), [(5e-5, False), (1e-2, True)])
def test_a_single_value_may_be_off_by_what_rounding_does_in_a_deep_network(change, differs):
    alone, beside = torch.full((1, 4), 3.0), torch.full((1, 4), 3.0 * (1 + change))
    job, witness = job_of(nn.BatchNorm1d(4)), Witness(Batch(0, (alone,), {}, 1), 0.25, 0.5)
    joined = torch.cat([torch.zeros(1, 4), beside, torch.zeros(2, 4)])
    moments = {0: channel_moments(witness.rows(joined))}
    with torch.no_grad():
        assert witness.is_disturbed(job, (0,), moments) == differs
        assert witness.is_disturbed(job, (0, 0), moments)
