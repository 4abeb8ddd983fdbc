"""The time that watching takes, and the share of the training's time that it may take."""

from __future__ import annotations

import time
from dataclasses import dataclass

# Steps that are read whatever they cost: what is found in a short run does not depend on time.
STEPS_ALWAYS_READ = 200


class _OwnTime:
    """Adds up the seconds spent inside, of all monitors in this process; it may be nested."""

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
    """

    seconds: float
    share: float
    steps_left_out: int = 0


class Budget:
    """Spreads the windows of steps that are read over the time, so that each costs a share of it.

    Args:
        max_share: What watching may cost, as a share of the training's time; 0 for no limit.
    """

    def __init__(self, max_share: float) -> None:
        self._max_share = max_share
        self._whole: tuple[float, float] | None = None
        self._window = self._evaluation = (0.0, 0.0)
        self._next_window = 0.0

    def start_window(self) -> None:
        """Begin to count the cost of a window of steps."""
        self._window = _now()
        self._whole = self._whole or self._window

    def end_window(self) -> None:
        """Put the next window off until this one cost no more than it may."""
        own, _ = _since(self._window)
        if self._max_share:
            self._next_window = self._window[1] + own + own / self._max_share

    def is_spent(self) -> bool:
        """Return whether the next window has to wait."""
        return time.perf_counter() < self._next_window

    def start_evaluation(self) -> None:
        """Leave out the time from now on: the budget is that of the steps."""
        self._evaluation = _now()

    def end_evaluation(self) -> None:
        """Count the time again."""
        own, clock = _since(self._evaluation)
        self._window = (self._window[0] + own, self._window[1] + clock)
        self._next_window += clock

    def overhead(self, steps_left_out: int) -> Overhead | None:
        """Return the cost so far; None before the first step."""
        if self._whole is None:
            return None
        own, clock = _since(self._whole)
        return Overhead(own, own / max(clock - own, 1e-9), steps_left_out)


def _now() -> tuple[float, float]:
    """Return the seconds of watching, and those on the clock."""
    return own_time.until_now(), time.perf_counter()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    own, clock = _now()
    return own - start[0], clock - start[1]
