"""The time that watching takes, and what is left unread so that it stays a small share."""

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
    steps_left_out: int
    evaluations_left_out: int


class Budget:
    """Chooses what is read, so that watching takes no more than a share of the training's time.

    Steps are read in windows. After a window or an evaluation that cost more, the next ones wait
    until the share is kept again. The first steps are read whatever they cost, and so are the last
    of those that are planned.

    Args:
        step_share: What reading steps may cost, as a share of the other time; 0 for no limit.
        evaluation_share: The same of evaluations.
        every_n_steps: Steps of a window.
        planned_steps: Steps that training will take in all; None if unknown.
    """

    def __init__(
        self,
        *,
        step_share: float,
        evaluation_share: float,
        every_n_steps: int,
        planned_steps: int | None,
    ) -> None:
        self._of_steps = _Account(step_share)
        self._of_evaluations = _Account(evaluation_share)
        self._every_n_steps = every_n_steps
        self._planned_steps = planned_steps
        self._start: tuple[float, float] | None = None
        self._steps_read = self._evaluations_left_out = 0

    def reads_step(self, steps: int) -> bool:
        """Return whether the step after this many is read."""
        if self._steps_read % self._every_n_steps == 0:
            if self._may_leave_out(steps) and self._of_steps.is_spent():
                return False
            self._of_steps.start()
            self._start = self._start or _now()
        return True

    def count_step(self) -> bool:
        """Count a step that was read, and return whether it is the last of its window."""
        self._steps_read += 1
        return self._steps_read % self._every_n_steps == 0

    def end_window(self) -> None:
        """Put off the next window for as long as this one and its checks have cost."""
        self._of_steps.end()

    def reads_evaluation(self, steps: int) -> bool:
        """Return whether an evaluation after this many steps is read."""
        if self._may_leave_out(steps) and self._of_evaluations.is_spent():
            self._evaluations_left_out += 1
            return False
        self._of_evaluations.start()
        return True

    def end_evaluation(self) -> None:
        """Put off the next evaluation for as long as this one and its check have cost."""
        self._of_steps.leave_out(self._of_evaluations.end())

    def overhead(self, steps: int) -> Overhead | None:
        """Return the cost so far, of this many steps; None if none was read."""
        if self._start is None:
            return None
        own, clock = _since(self._start)
        return Overhead(
            seconds=own,
            share=own / max(clock - own, 1e-9),
            steps_left_out=steps - self._steps_read,
            evaluations_left_out=self._evaluations_left_out,
        )

    def _may_leave_out(self, steps: int) -> bool:
        """Return whether something may be left out now: neither at the start nor at the end."""
        if steps < STEPS_ALWAYS_READ:
            return False
        planned = self._planned_steps
        return not planned or steps < planned - 2 * self._every_n_steps


class _Account:
    """Spreads readings over the time, so that they cost no more than a share of it; 0: no limit."""

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


def _now() -> tuple[float, float]:
    """Return the seconds of watching, and those on the clock."""
    return own_time.until_now(), time.perf_counter()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    own, clock = _now()
    return own - start[0], clock - start[1]
