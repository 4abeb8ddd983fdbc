"""The processes that calibrate together, each on its share of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch.distributed as dist

from bnguard.errors import BNGuardError, CalibrationError, in_one_line

T = TypeVar("T")


class Ranks(Protocol):
    """The processes that calibrate together.

    Attributes:
        rank: Number of this one, from 0.
        size: How many there are.
    """

    rank: int
    size: int

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do this rank's part of a work; return the results of all, in the order of the ranks.

        Every rank calls this as often as the others, so that none waits for one that failed.

        Raises:
            CalibrationError: The work failed on another rank. What this rank's own raises, passes.
        """


class SingleRank:
    """A process on its own."""

    rank, size = 0, 1

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do the work."""
        return [work()]


class ProcessGroup:
    """The processes of the default group of ``torch.distributed``."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do this rank's part, and exchange the results, which must be picklable."""
        try:
            mine = work()
        except BaseException as error:
            self._exchanged(_Failure(_told(error)))
            raise
        results = self._exchanged(mine)
        for rank, result in enumerate(results):
            if isinstance(result, _Failure):
                raise CalibrationError(f"rank {rank} failed: {result.message}")
        return cast("list[T]", results)

    def _exchanged(self, mine: object) -> list[object]:
        results: list[object] = [None] * self.size
        dist.all_gather_object(results, mine)
        return results


@dataclass(frozen=True)
class _Failure:
    message: str


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, BNGuardError) else in_one_line(error)


def current_ranks() -> Ranks:
    """Return the default process group where one is initialised, else this process alone."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroup()
    return SingleRank()
