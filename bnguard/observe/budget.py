"""The time that watching takes, and the share of the training's time that it may take."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

# Steps that are read whatever they cost: what is found in a short run does not depend on time.
STEPS_ALWAYS_READ = 200


class _OwnTime(threading.local):
    """Adds up the seconds spent inside, of all monitors in this thread; it may be nested."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._depth = 0
        self._since = 0.0

    def __enter__(self) -> None:
        if not self._depth:
            self._since = time.perf_counter()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._since

    def until_now(self) -> float:
        """Return the seconds, those of the current stretch included."""
        return self.seconds + (time.perf_counter() - self._since if self._depth else 0.0)


own_time = _OwnTime()


@dataclass(frozen=True)
class Overhead:
    """What watching cost.

    Attributes:
        seconds: Time in bnguard's own code, evaluations included.
        share: The same, as a share of the rest of the time since the first step.
        steps_left_out: Training steps that were not read, to save time.
        evaluations_left_out: Evaluations that were not read.
    """

    seconds: float
    share: float
    steps_left_out: int = 0
    evaluations_left_out: int = 0


class Account:
    """Spreads what is read over the time, so that each reading costs no more than a share of it.

    Args:
        max_share: What reading may cost, as a share of the other time; 0 for no limit.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._start = (0.0, 0.0)
        self._next = 0.0

    def start(self) -> None:
        """Begin to count the cost of a reading."""
        self._start = _now()

    def end(self) -> float:
        """Put the next reading off until this one cost no more than it may; return the cost."""
        own, _ = _since(self._start)
        if self._max_share:
            self._next = self._start[1] + own + own / self._max_share
        return own

    def leave_out(self, own: float) -> None:
        """Do not count seconds that another account has."""
        self._start = (self._start[0] + own, self._start[1])

    def is_spent(self) -> bool:
        """Return whether the next reading has to wait."""
        return time.perf_counter() < self._next


class Stopwatch:
    """Measures what watching costs, from now on."""

    def __init__(self) -> None:
        self._start = _now()

    def overhead(self) -> Overhead:
        """Return the cost so far."""
        own, clock = _since(self._start)
        return Overhead(own, own / max(clock - own, 1e-9))


def _now() -> tuple[float, float]:
    """Return the seconds of watching, and those on the clock."""
    return own_time.until_now(), time.perf_counter()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    own, clock = _now()
    return own - start[0], clock - start[1]
