"""Threads that stop where they are told to, in the surroundings of the caller."""

import contextvars
import threading
from functools import partial

import pytest
import torch

from bnguard.layers.preserve import RandomStream
from bnguard.recalibration.lockstep import (
    StuckError,
    Surroundings,
    Walk,
    advance_at_once,
    advance_in_turn,
)

CPU = torch.device("cpu")


def walk(forward, seed=0):
    return Walk(forward, Surroundings(1), RandomStream(seed, CPU))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_all_stand_before_one_goes_on(width):
    said = []

    def forward(name):
        for step in range(3):
            said.append((step, name))
            Walk.here().stop()

    walks = [walk(lambda name=name: forward(name)) for name in "abcd"]
    for step in range(3):
        advance_at_once(walks, width, patience=10)
        assert sorted(said) == [(s, name) for s in range(step + 1) for name in "abcd"]
        assert not any(each.is_finished for each in walks)
    advance_at_once(walks, width, patience=10)
    assert all(each.is_finished and each.error is None for each in walks)


def test_no_more_run_at_once_than_may():
    running = most = 0
    lock = threading.Lock()

    def forward():
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.02)
        with lock:
            running -= 1

    advance_at_once([walk(forward) for _ in range(8)], width=3, patience=10)
    assert most == 3


def test_an_exception_ends_the_walk_and_is_kept():
    error = ValueError("no")

    def forward():
        raise error

    failing, fine = walk(forward), walk(lambda: None)
    advance_in_turn([failing, fine], patience=10)
    assert failing.error is error
    assert fine.error is None


@pytest.mark.parametrize("width", [None, 1, 3])
def test_a_walk_that_does_not_stop(width):
    event = threading.Event()
    walks = [walk(event.wait) for _ in range(3)]
    advance = advance_in_turn if width is None else partial(advance_at_once, width=width)
    with pytest.raises(StuckError, match="not come to its next layer in 0 s"):
        advance(walks, patience=0.05)
    event.set()
    for each in walks:
        each.abandon()
    for each in walks:
        each.join()


def test_abandoned_walks_unwind_and_end():
    unwound = []

    def forward():
        try:
            Walk.here().stop()
        except Exception:
            unwound.append("swallowed")
        finally:
            unwound.append("unwound")

    standing, fresh = walk(forward), walk(forward)
    advance_in_turn([standing], patience=10)
    for each in (standing, fresh):
        each.abandon()
        each.join()
    assert unwound == ["unwound"]
    assert standing.is_finished
    assert standing.error is None


def test_each_draws_from_its_own_stream_and_disturbs_none():
    drawn = {}

    def forward(name):
        drawn[name] = [torch.rand(1).item()]
        Walk.here().stop()
        drawn[name].append(torch.rand(1).item())

    state = torch.get_rng_state()
    walks = [walk(lambda name=name: forward(name), seed) for seed, name in enumerate("ab")]
    for _ in range(2):
        advance_in_turn(walks, patience=10)
    assert torch.equal(state, torch.get_rng_state())
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        assert drawn[name] == [torch.rand(1).item(), torch.rand(1).item()]


def test_the_surroundings_of_the_caller():
    seen = {}
    variable = contextvars.ContextVar("variable", default="nothing")

    def forward():
        seen.update(
            grad=torch.is_grad_enabled(),
            inference=torch.is_inference_mode_enabled(),
            autocast=torch.is_autocast_enabled("cpu"),
            dtype=torch.get_autocast_dtype("cpu"),
            device=torch.zeros(1).device.type,
            variable=variable.get(),
        )

    advance_in_turn([walk(forward)], patience=10)
    assert seen == {
        "grad": False,
        "inference": False,
        "autocast": False,
        "dtype": torch.bfloat16,
        "device": "cpu",
        "variable": "nothing",
    }
    variable.set("something")
    with torch.inference_mode(), torch.autocast("cpu", torch.float16), torch.device("meta"):
        there = walk(forward)
    advance_in_turn([there], patience=10)
    assert seen == {
        "grad": False,
        "inference": True,
        "autocast": True,
        "dtype": torch.float16,
        "device": "meta",
        "variable": "something",
    }
    assert not torch.is_inference_mode_enabled()
    assert torch.zeros(1).device.type == "cpu"
