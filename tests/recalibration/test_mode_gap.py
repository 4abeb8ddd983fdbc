"""The mode gap before and after a recalibration."""

import copy
import gc
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import bnguard
from bnguard.recalibration.batches import Batch, SampledRows


def net():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.BatchNorm1d(6))


def rows_of(batches):
    samples = SampledRows()
    batches = [Batch(i, (x,), {}, len(x)) for i, x in enumerate(batches)]
    assert list(samples.sample_from(batches)) == batches
    return None if samples.batch is None else samples.batch.args[0]


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_samples_are_from_all_over_the_data(size):
    rows = rows_of(torch.arange(1000.0).view(-1, 1).split(size)).flatten()
    assert 32 <= len(rows) <= 64
    assert torch.equal(rows, torch.arange(len(rows)) * (rows[1] - rows[0]))
    assert rows[-1] > 900


def test_samples_are_copies_and_of_one_shape():
    x = torch.zeros(3, 2)
    rows = rows_of([x, torch.ones(2, 5), x])
    x.add_(1.0)
    assert torch.equal(rows, torch.zeros(6, 2))
    assert rows_of([]) is None


def test_the_gap_closes_and_measuring_it_changes_nothing():
    model, x = net(), torch.randn(90, 4) * 3.0 + 2.0
    result = bnguard.recalibrate(model.train(), x.split(7), progress=False)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert result.mode_gap_before.relative_change > 0.5
    assert result.mode_gap_after.relative_change < 0.2
    assert result.mode_gap_after.samples == 45
    assert all(module.training for module in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    before, after = (
        f"{gap.relative_change:.3g}" for gap in (result.mode_gap_before, result.mode_gap_after)
    )
    assert f"mode gap {before} → {after} σ of the outputs (sampling alone: " in str(result)
    assert "), on 45 samples" in str(result)


def test_a_gap_that_cannot_be_measured_says_why():
    model, x = net(), torch.randn(90, 4)
    model[1].running_mean[0] = float("nan")
    result = bnguard.recalibrate(model, x.split(7))
    assert result.mode_gap_before == "the statistics of layer 1 were not finite"
    assert f"mode gap ? → {result.mode_gap_after.relative_change:.3g}" in str(result)


def test_printing_runs_nothing_and_says_what_was_measured_while_recalibrating():
    model, x = net(), torch.randn(90, 4)
    result = bnguard.recalibrate(model, x.split(7))
    text, calls = str(result), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    model[0].weight.data.zero_()
    assert str(result) == text
    assert not calls


def test_a_result_keeps_neither_the_model_nor_samples_alive():
    model, x = net(), torch.randn(90, 4)
    result = bnguard.recalibrate(model, x.split(7))
    linear, bn = weakref.ref(model[0]), model[1]
    before = result.before["1"].mean
    kept = pickle.dumps(result)
    del model
    gc.collect()
    assert linear() is None
    result.undo()
    assert np.array_equal(bn.running_mean.double().numpy(), before)
    assert len(kept) < 10_000


def test_undo_reaches_a_model_whose_buffers_were_replaced():
    model, x = net(), torch.randn(90, 4)
    before = model[1].running_mean.clone()
    result = bnguard.recalibrate(model, x.split(7))
    model.double()
    result.undo()
    assert torch.equal(model[1].running_mean, before.double())
