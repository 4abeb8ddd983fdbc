"""Measuring, cutting, joining and moving the batches of loaders, and drawing samples."""

import collections
import dataclasses
import types

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from bnguard.recalibration.batches import (
    Batch,
    can_be_joined,
    can_draw,
    join_batches,
    load_samples,
    read_batches,
    shuffle_indices,
)


def read_all(loader, *, samples=100, forward=None):
    return list(
        read_batches(loader, nn.Identity(), forward, samples=samples, device=torch.device("cpu"))
    )


def read(payload, *, samples=100, forward=None):
    (batch,) = read_all([payload], samples=samples, forward=forward)
    return batch


def whole(model, batch):
    return model(batch)


Pair = collections.namedtuple("Pair", "image boxes")


@pytest.mark.parametrize(
    ("payload", "size"),
    [
        (torch.zeros(5, 3), 5),
        ([torch.zeros(5, 3), torch.zeros(2)], 5),
        ({"name": "x", "image": torch.zeros(4, 3, 8, 8)}, 4),
        (Pair([torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], "boxes"), 2),
        ((torch.tensor(1.0), torch.zeros(6, 2)), 6),
        (object(), 1),
    ],
    ids=["tensor", "list", "mapping", "images", "scalar first", "anything"],
)
def test_the_number_of_samples(payload, size):
    assert read(payload, forward=whole).size == size


def test_a_batch_is_cut_in_all_its_tensors():
    batch = read(
        {"a": torch.arange(6), "b": (torch.arange(12).view(6, 2), "x")}, samples=4, forward=whole
    )
    (payload,) = batch.args
    assert batch.size == 4
    assert torch.equal(payload["a"], torch.arange(4))
    assert torch.equal(payload["b"][0], torch.arange(8).view(4, 2))
    assert payload["b"][1] == "x"


def test_a_batch_whose_samples_are_not_rows_is_used_whole():
    payload = [torch.zeros(3, 8, 8), torch.zeros(3, 9, 9), torch.zeros(1, 9, 9)]
    batch = read((payload,), samples=2, forward=whole)
    assert batch.size == 3
    assert not batch.can_be_cut


def test_empty_batches_are_skipped():
    batches = list(
        read_batches(
            [torch.zeros(0, 3), torch.zeros(2, 3)],
            nn.Identity(),
            None,
            samples=5,
            device=torch.device("cpu"),
        )
    )
    assert [(batch.index, batch.size) for batch in batches] == [(1, 2)]


def batch_of(*tensors, index=0, **kwargs):
    return Batch(index, tensors, kwargs, len(tensors[0]))


def test_batches_of_the_same_shape_can_be_joined():
    first = batch_of(torch.zeros(2, 3), mask=torch.zeros(2), scale=1.0)
    second = batch_of(torch.ones(4, 3), mask=torch.ones(4), scale=1.0, index=1)
    assert can_be_joined(first, second)
    both = join_batches([first, second])
    assert (both.index, both.size) == (0, 6)
    assert torch.equal(both.args[0][:, 0], torch.tensor([0.0, 0, 1, 1, 1, 1]))
    assert both.kwargs["mask"].shape == (6,)
    assert both.kwargs["scale"] == 1.0


@pytest.mark.parametrize(
    "other",
    [
        batch_of(torch.zeros(2, 4), scale=1.0),
        batch_of(torch.zeros(2, 3).double(), scale=1.0),
        batch_of(torch.zeros(2, 3), scale=2.0),
        batch_of(torch.zeros(2, 3)),
        batch_of(torch.zeros(2, 3), scale=object()),
        batch_of(torch.zeros(2, 3), scale=torch.zeros(())),
    ],
    ids=["shape", "dtype", "option", "missing", "object", "scalar"],
)
def test_others_cannot(other):
    assert not can_be_joined(batch_of(torch.zeros(2, 3), scale=1.0), other)


@dataclasses.dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    name: str = "a"


@pytest.mark.parametrize(
    ("payload", "x"),
    [
        (lambda x: Sample(x), lambda batch: batch.args[0].x),
        (lambda x: {"a": [Sample(x), {"y": x}]}, lambda batch: batch.args[0]["a"][0].x),
        (lambda x: types.MappingProxyType({"x": x}), lambda batch: batch.args[0]["x"]),
        (lambda x: (x,), lambda batch: batch.args[0][0]),
    ],
    ids=["dataclass", "nested", "read-only mapping", "tuple"],
)
def test_containers_of_any_kind_are_cut_and_joined(payload, x):
    rows = torch.arange(12.0).view(6, 2)
    loader = [payload(rows[:4]), payload(rows[4:])]
    batches = read_all(loader, samples=5, forward=whole)
    assert [batch.size for batch in batches] == [4, 1]
    assert torch.equal(x(join_batches(batches)), rows[:5])
    assert torch.equal(x(batches[0].rows(1, 3).copied()), rows[1:3])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_batch_of_signals_is_not_a_list_of_images(size):
    loader = [torch.randn(size, 2, 9)] * 2
    batches = read_all(loader)
    assert [batch.size for batch in batches] == [size, size]
    assert all(batch.can_be_cut for batch in batches)


@pytest.mark.parametrize("entry", [lambda x: x, lambda x: {"image": x}], ids=["images", "mappings"])
def test_a_list_of_samples_is_counted_and_used_whole(entry):
    loader = [[entry(torch.randn(3, 5, 5)) for _ in range(3)] for _ in range(4)]
    batches = read_all(loader, samples=7, forward=whole)
    assert [batch.size for batch in batches] == [3, 3, 3]
    assert not any(batch.can_be_cut for batch in batches)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(3.0))


def test_samples_are_drawn_with_the_settings_of_the_loader_unless_others_are_given():
    loader = DataLoader(torch.arange(7.0), batch_size=3, shuffle=True, drop_last=True)
    state = torch.get_rng_state()
    assert sorted(shuffle_indices(7)) == list(range(7))
    assert shuffle_indices(7) == shuffle_indices(7) != list(range(7))
    assert torch.equal(state, torch.get_rng_state())
    assert [batch.tolist() for batch in load_samples(loader, [5, 0, 2, 1])] == [[5, 0, 2], [1]]
    pairs = load_samples(loader, [5, 0, 2], batch_size=2, drop_last=True)
    assert [batch.tolist() for batch in pairs] == [[5, 0]]


def test_streams_have_no_samples_to_draw():
    assert can_draw(DataLoader(torch.arange(7.0)))
    assert not can_draw(DataLoader(Stream()))
    assert not can_draw([torch.zeros(2)])
