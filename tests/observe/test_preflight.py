"""What is known before the first batch."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
)

import bnguard
from bnguard.observe.training_plan import Plan, plan_training
from tests.networks import mlp


class Endless(Sampler):
    """A sampler that goes on for ever, and says so when it is asked for its length."""

    def __iter__(self):
        return iter(int, 1)

    def __len__(self):
        raise RuntimeError("endless")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(65))


@pytest.mark.parametrize(
    ("loader", "last"),
    [
        (DataLoader(range(65), 32), 1),
        (DataLoader(range(65), 32, drop_last=True), 32),
        (DataLoader(range(64), 32), 32),
        (DataLoader(range(5), 32), 5),
        (DataLoader(range(100), 32, sampler=SubsetRandomSampler(range(33))), 1),
        # Two ranks share 66 samples: each draws 33.
        (DataLoader(range(66), 32, sampler=DistributedSampler(range(66), 2, 0)), 1),
        (DataLoader(range(65), batch_sampler=BatchSampler(RandomSampler(range(65)), 32, False)), 1),
        (DataLoader(Stream(), 32), None),
        (DataLoader(range(65), batch_size=None), None),
        (DataLoader(range(65), batch_sampler=[[0, 1], [2]]), None),
        (DataLoader(range(65), 32, sampler=Endless()), None),
        ([torch.zeros(4, 2), torch.zeros(1, 2)], None),
        (iter([torch.zeros(4, 2)]), None),
        ([1, 2, 3], None),
        (None, None),
    ],
)
def test_the_last_batch_of_a_loader(loader, last):
    assert plan_training(loader).last_batch_size == last


def test_settings_of_the_trainer_are_kept():
    plan = plan_training(None, ranks=4, accumulated_batches=2)
    assert plan == Plan(ranks=4, accumulated_batches=2)


def test_a_last_batch_of_one_is_reported_after_the_first_step():
    told = []
    model = mlp()
    loader = DataLoader(torch.randn(33, 64), 16)
    with bnguard.watch(model, loader=loader, on_findings=told.append) as monitor:
        for batch in loader:
            model(batch)
            monitor.step()
            break
    assert [(group.worst.code, group.worst.step) for group in told] == [("BN102", 1)]
    assert "at the end of the epoch" in told[0].worst.message


def test_one_sample_with_many_positions_is_not_a_batch_of_one():
    told = []
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    loader = DataLoader(torch.randn(33, 1, 8, 8), 16)
    with bnguard.watch(model, loader=loader, on_findings=told.append) as monitor:
        model(next(iter(loader)))
        monitor.step()
    assert told == []
