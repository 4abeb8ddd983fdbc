"""Ranks that bring together what they have: threads here, processes in ``test_ddp.py``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from bnguard import distributed as exchange
from bnguard.distributed import Exchange


@pytest.fixture
def rank(monkeypatch):
    """Makes the exchange of a rank of three."""
    store = dist.HashStore()
    monkeypatch.setattr(exchange, "number_of_ranks", lambda: 3)
    monkeypatch.setattr(exchange, "_store", lambda name: dist.PrefixStore(name, store))
    monkeypatch.setattr(exchange, "_FIRST_PATIENCE_S", 0.3)

    def make(number):
        monkeypatch.setattr(exchange.dist, "get_rank", lambda: number)
        return Exchange("test")

    return make


def together(*work):
    with ThreadPoolExecutor(len(work)) as pool:
        return [done.result(timeout=20) for done in [pool.submit(each) for each in work]]


def rounds(place, number):
    return [place.merge(place.rank * 10 + turn, list) for turn in range(number)]


def test_all_get_what_each_has_round_after_round(rank):
    places = [rank(number) for number in range(3)]
    results = together(*(lambda place=place: rounds(place, 3) for place in places))
    assert results == [[[0, 10, 20], [1, 11, 21], [2, 12, 22]]] * 3


def test_what_the_store_would_not_take_in_one_piece(rank):
    places = [rank(number) for number in range(3)]
    part = bytes(9 * 2**20)
    results = together(
        *(lambda place=place: place.merge(part, lambda parts: b"".join(parts)) for place in places)
    )
    assert [len(result) for result in results] == [3 * len(part)] * 3


def test_a_rank_that_leaves_is_not_waited_for(rank):
    places = [rank(number) for number in range(3)]

    def leaves():
        first = rounds(places[1], 1)
        places[1].leave()
        return first

    results = together(lambda: rounds(places[0], 3), leaves, lambda: rounds(places[2], 3))
    assert results[0] == results[2] == [[0, 10, 20], [1, None, 21], [2, None, 22]]
    assert results[1] == [[0, 10, 20]]


def test_a_rank_that_never_comes_is_waited_for_once(rank):
    places = [rank(0), rank(2)]
    results = together(*(lambda place=place: rounds(place, 2) for place in places))
    assert results == [[[0, None, 20], [1, None, 21]]] * 2


def test_without_rank_zero_each_is_alone(rank):
    places = [rank(1), rank(2)]
    results = together(*(lambda place=place: rounds(place, 2) for place in places))
    assert results == [[[None, 10, None], [None, 11, None]], [[None, None, 20], [None, None, 21]]]


def test_one_process_has_what_it_brings():
    assert Exchange("alone").merge(3, list) == [3]
