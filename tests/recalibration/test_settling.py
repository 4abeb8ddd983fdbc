"""A layer gets its statistics once all that arrives at it is known."""

import math

import pytest
import torch
from torch import nn

from bnguard.errors import CalibrationError
from bnguard.layers.moments import channel_moments
from bnguard.recalibration.layer_inputs import NonFiniteError, settle
from tests.recalibration.jobs import job_of


def test_parts_of_all_ranks_are_pooled():
    model, x = nn.BatchNorm1d(3), torch.randn(30, 3) * 2.0 + torch.arange(30.0).view(-1, 1)
    parts = [channel_moments(part) for part in x.split(7)]
    ranks = [{0: parts[0], 1: parts[1]}, {}, {0: parts[2], 1: parts[3], 2: parts[4]}]
    assert len(settle(job_of(model), 0, ranks, 30)) == 5
    assert torch.allclose(model.running_mean, x.mean(0), rtol=1e-5)
    assert torch.allclose(model.running_var, x.var(0), rtol=1e-5)


def test_what_is_not_finite_is_told_by_chunk_on_the_rank_that_has_it():
    bad = torch.randn(4, 3)
    bad[0, 0] = math.nan
    job, good = job_of(nn.BatchNorm1d(3)), channel_moments(torch.randn(4, 3))
    with pytest.raises(NonFiniteError) as mine:
        settle(job, 0, [{0: good, 5: channel_moments(bad)}, {0: good}], 12)
    assert (mine.value.index, mine.value.chunks) == (0, {5})
    with pytest.raises(NonFiniteError) as others:
        settle(job, 0, [{0: good}, {0: channel_moments(bad)}], 12)
    assert others.value.chunks == frozenset()


def test_one_value_is_too_few():
    with pytest.raises(CalibrationError, match="1 value a channel is too few"):
        settle(job_of(nn.BatchNorm1d(3)), 0, [{0: channel_moments(torch.ones(1, 3))}], 1)
