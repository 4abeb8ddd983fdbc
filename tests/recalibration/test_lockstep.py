"""Threads that stop where they are told to, in the surroundings of the caller."""

import contextvars
import threading
from functools import partial

import pytest
import torch

from bnguard.layers.preserve import RandomStream
from bnguard.recalibration.lockstep import (
    PausableForward,
    StuckError,
    ThreadContext,
    advance_in_parallel,
    advance_in_turn,
)

CPU = torch.device("cpu")


def paused(forward, seed=0):
    return PausableForward(forward, ThreadContext(1), RandomStream(seed, CPU))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_all_stand_before_one_goes_on(width):
    said = []

    def forward(name):
        for step in range(3):
            said.append((step, name))
            PausableForward.current().stop()

    forwards = [paused(lambda name=name: forward(name)) for name in "abcd"]
    for step in range(3):
        advance_in_parallel(forwards, width, timeout=10)
        assert sorted(said) == [(s, name) for s in range(step + 1) for name in "abcd"]
        assert not any(each.is_finished for each in forwards)
    advance_in_parallel(forwards, width, timeout=10)
    assert all(each.is_finished and each.error is None for each in forwards)


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

    advance_in_parallel([paused(forward) for _ in range(8)], width=3, timeout=10)
    assert most == 3


def test_an_exception_ends_the_forward_and_is_kept():
    error = ValueError("no")

    def forward():
        raise error

    failing, fine = paused(forward), paused(lambda: None)
    advance_in_turn([failing, fine], timeout=10)
    assert failing.error is error
    assert fine.error is None


@pytest.mark.parametrize("width", [None, 1, 3])
def test_a_forward_that_does_not_stop(width):
    event = threading.Event()
    forwards = [paused(event.wait) for _ in range(3)]
    advance = advance_in_turn if width is None else partial(advance_in_parallel, width=width)
    with pytest.raises(StuckError, match="did not reach its next layer in 0 s"):
        advance(forwards, timeout=0.05)
    event.set()
    for each in forwards:
        each.cancel()
    for each in forwards:
        each.join()


def test_cancelled_forwards_unwind_and_end():
    unwound = []

    def forward():
        try:
            PausableForward.current().stop()
        except Exception:
            unwound.append("swallowed")
        finally:
            unwound.append("unwound")

    standing, fresh = paused(forward), paused(forward)
    advance_in_turn([standing], timeout=10)
    for each in (standing, fresh):
        each.cancel()
        each.join()
    assert unwound == ["unwound"]
    assert standing.is_finished
    assert standing.error is None


def test_each_draws_from_its_own_stream_and_disturbs_none():
    drawn = {}

    def forward(name):
        drawn[name] = [torch.rand(1).item()]
        PausableForward.current().stop()
        drawn[name].append(torch.rand(1).item())

    state = torch.get_rng_state()
    forwards = [paused(lambda name=name: forward(name), seed) for seed, name in enumerate("ab")]
    for _ in range(2):
        advance_in_turn(forwards, timeout=10)
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

    advance_in_turn([paused(forward)], timeout=10)
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
        there = paused(forward)
    advance_in_turn([there], timeout=10)
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
