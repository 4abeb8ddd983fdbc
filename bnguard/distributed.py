"""Several processes: what each has is brought together, in a training and in a calibration.

:class:`Exchange` does not wait for a process that is gone; :class:`Ranks` run in step.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch.distributed as dist

from bnguard.errors import BNGuardError, CalibrationError, in_one_line

T = TypeVar("T")
Result = TypeVar("Result")
# A rank that has answered before is waited for: it may be busy with the user's code. One that never
# has may lack a monitor, and is given only the time by which ranks differ in speed.
_PATIENCE_S = 120.0
_FIRST_PATIENCE_S = 30.0
_PAUSES_S = (0.0005, 0.05)
# The store takes values of 8 MiB at most.
_MOST_BYTES = 4 * 2**20


def number_of_ranks() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Exchange:
    """A place where the ranks bring together what they have, in one round after another.

    Args:
        name: Its name among other exchanges; the same on all ranks.

    Attributes:
        rank: Number of this process.
        size: How many there are.
    """

    def __init__(self, name: str) -> None:
        self.size = number_of_ranks()
        self.rank = 0 if self.size == 1 else dist.get_rank()
        self._round = 0
        self._laid_out: list[str] = []
        # Rank zero may itself be waiting for another.
        self._first_patience_s = _FIRST_PATIENCE_S * (1 if self.rank == 0 else 2)
        self._store: Any = None if self.size == 1 else _store(name)
        self._set(f"here/{self.rank}", b"")

    def merge(self, mine: T, merge: Callable[[Sequence[T | None]], Result]) -> Result:
        """Return what ``merge`` makes of what each rank brings, None for a rank that is gone.

        Rank zero merges, and all ranks get the same; a rank that rank zero has left behind gets
        what is made of its own. To be called by each rank as often as by the others.
        """
        self._round += 1
        alone = [mine if rank == self.rank else None for rank in range(self.size)]
        if self._store is None:
            return merge(alone)
        if self.rank > 0:
            self._put(f"{self._round}/{self.rank}", mine)
            results = self._take(f"{self._round}/0", 0)
            return results[0] if results else merge(alone)
        brought = [mine]
        for rank in range(1, self.size):
            brought += self._take(f"{self._round}/{rank}", rank) or [None]
        result = merge(brought)
        # Who came to this round has read the result of the last.
        self._delete(self._laid_out)
        self._laid_out = self._put(f"{self._round}/0", result)
        return result

    def leave(self) -> None:
        """Let nobody wait for this rank any longer."""
        self._set(f"left/{self.rank}", b"")

    def _put(self, key: str, value: object) -> list[str]:
        """Lay out a value, and return the keys that hold it."""
        data = pickle.dumps(value)
        starts = range(0, len(data), _MOST_BYTES)
        parts = [f"{key}/{number}" for number in range(len(starts))]
        for part, start in zip(parts, starts, strict=True):
            self._set(part, data[start : start + _MOST_BYTES])
        # The number of parts comes last, and says that all are there.
        self._set(key, str(len(parts)).encode())
        return [key, *parts]

    def _take(self, key: str, rank: int) -> list[Any]:
        """Return what a rank has published, or nothing if the rank is gone."""
        # Whoever holds the store may have ended.
        with contextlib.suppress(RuntimeError):
            if self._arrives(key, rank):
                parts = [f"{key}/{number}" for number in range(int(self._store.get(key)))]
                value = pickle.loads(b"".join(map(self._store.get, parts)))
                if self.rank == 0:
                    self._delete([key, *parts])
                return [value]
        return []

    def _arrives(self, key: str, rank: int) -> bool:
        """Wait until a rank has laid something out, and return whether it has."""
        start, pause = time.monotonic(), _PAUSES_S[0]
        while not self._store.check([key]):
            waited = time.monotonic() - start
            if self._store.check([f"left/{rank}"]) or waited > _PATIENCE_S:
                return bool(self._store.check([key]))
            if waited > self._first_patience_s and not self._store.check([f"here/{rank}"]):
                # Once is enough.
                self._first_patience_s = 0.0
                return False
            time.sleep(pause)
            pause = min(2 * pause, _PAUSES_S[1])
        return True

    def _set(self, key: str, value: bytes) -> None:
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.set(key, value)

    def _delete(self, keys: Iterable[str]) -> None:
        # Not every store can.
        with contextlib.suppress(RuntimeError):
            for key in keys:
                self._store.delete_key(key)


def _store(name: str) -> Any:
    """Return the store through which the process group was set up; None if it has none."""
    try:
        c10d = dist.distributed_c10d
        return c10d.PrefixStore(f"bnguard/{name}", c10d._get_default_store())
    except (AttributeError, TypeError, ValueError):
        return None


class Ranks:
    """The processes of ``torch.distributed`` that calibrate together; without a group, this one.

    Attributes:
        rank: Number of this one, from 0.
        size: How many there are.
    """

    def __init__(self) -> None:
        self.size = number_of_ranks()
        self.rank = 0 if self.size == 1 else dist.get_rank()

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do this rank's part of a work; return the results of all, in the order of the ranks.

        Every rank calls this as often as the others, so that none waits for one that failed.
        Results must be picklable.

        Raises:
            CalibrationError: The work failed on another rank. What this rank's own raises, passes.
        """
        if self.size == 1:
            return [work()]
        try:
            mine = work()
        except BaseException as error:
            message = str(error) if isinstance(error, BNGuardError) else in_one_line(error)
            self._exchange(_Failure(message))
            raise
        results = self._exchange(mine)
        for rank, result in enumerate(results):
            if isinstance(result, _Failure):
                raise CalibrationError(f"rank {rank} failed: {result.message}")
        return cast("list[T]", results)

    def _exchange(self, mine: object) -> list[object]:
        results: list[object] = [None] * self.size
        dist.all_gather_object(results, mine)
        return results


@dataclass(frozen=True)
class _Failure:
    message: str
