"""Forwards that pause in threads, with the settings of the calling thread."""

import contextvars
import threading

import pytest
import torch

from bnguard.layers.preserve import RandomStream
from bnguard.recalibration.lockstep import (
    PausableForward,
    StuckError,
    ThreadContext,
    advance,
)

CPU = torch.device("cpu")


def paused(forward, seed=0):
    return PausableForward(forward, ThreadContext(1), RandomStream(seed, CPU))


@pytest.mark.parametrize("width", [1, 2, 5])
def test_all_pause_before_one_continues(width):
    said = []

    def forward(name):
        for step in range(3):
            said.append((step, name))
            PausableForward.current().stop()

    forwards = [paused(lambda name=name: forward(name)) for name in "abcd"]
    for step in range(3):
        advance(forwards, width, timeout=10)
        assert sorted(said) == [(s, name) for s in range(step + 1) for name in "abcd"]
        assert not any(each.is_finished for each in forwards)
    advance(forwards, width, timeout=10)
    assert all(each.is_finished and each.error is None for each in forwards)


def test_at_most_width_forwards_run_at_once():
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

    advance([paused(forward) for _ in range(8)], width=3, timeout=10)
    assert most == 3


def test_an_exception_ends_the_forward_and_is_kept():
    error = ValueError("no")

    def forward():
        raise error

    failing, fine = paused(forward), paused(lambda: None)
    advance([failing, fine], 1, timeout=10)
    assert failing.error is error
    assert fine.error is None


@pytest.mark.parametrize("width", [1, 3])
def test_a_forward_that_does_not_stop(width):
    event = threading.Event()
    forwards = [paused(event.wait) for _ in range(3)]
    with pytest.raises(StuckError, match="did not reach its next layer in 0 s"):
        advance(forwards, width, timeout=0.05)
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
    advance([standing], 1, timeout=10)
    for each in (standing, fresh):
        each.cancel()
        each.join()
    assert unwound == ["unwound"]
    assert standing.is_finished
    assert standing.error is None


def test_each_draws_from_its_own_stream_and_leaves_the_global_one():
    drawn = {}

    def forward(name):
        drawn[name] = [torch.rand(1).item()]
        PausableForward.current().stop()
        drawn[name].append(torch.rand(1).item())

    state = torch.get_rng_state()
    forwards = [paused(lambda name=name: forward(name), seed) for seed, name in enumerate("ab")]
    for _ in range(2):
        advance(forwards, 1, timeout=10)
    assert torch.equal(state, torch.get_rng_state())
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        assert drawn[name] == [torch.rand(1).item(), torch.rand(1).item()]


def test_the_settings_of_the_calling_thread():
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

    advance([paused(forward)], 1, timeout=10)
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
    advance([there], 1, timeout=10)
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
