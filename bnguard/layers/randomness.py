"""Random numbers of a forward that do not depend on what else draws some, nor disturb it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[RandomStream]:
    """Let PyTorch draw from a seed for a while, on the CPU and on a device."""
    stream = RandomStream(seed, device)
    with stream.drawn_from():
        yield stream


class RandomStream:
    """Random numbers that begin at a seed and go on where they were left.

    Args:
        seed: Where the stream begins.
        device: The device that draws, besides the CPU.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._device = device
        # Generators of its own: torch.manual_seed would seed devices too that begin later.
        drawing = [torch.device("cpu"), *([device] if device.type == "cuda" else [])]
        self._begin = self._states = [
            torch.Generator(each).manual_seed(seed).get_state() for each in drawing
        ]

    @property
    def is_untouched(self) -> bool:
        """Whether nothing has been drawn from it so far."""
        return all(map(torch.equal, self._begin, self._states))

    @contextmanager
    def drawn_from(self) -> Iterator[None]:
        """Let PyTorch draw from this stream for a while."""
        outside = random_states(self._device)
        _set_random_states(self._states, self._device)
        try:
            yield
        finally:
            self._states = random_states(self._device)
            _set_random_states(outside, self._device)


def random_states(device: torch.device) -> list[Tensor]:
    """Return the state of the random numbers of the CPU, and of a CUDA device."""
    if device.type != "cuda":
        return [torch.get_rng_state()]
    return [torch.get_rng_state(), torch.cuda.get_rng_state(device)]


def _set_random_states(states: Sequence[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)
