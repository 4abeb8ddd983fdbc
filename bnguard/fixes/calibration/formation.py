"""The chunks of one rank on their way through a model, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from bnguard.fixes.calibration.arrivals import arrived_moments, on_host
from bnguard.fixes.calibration.batches import Batch
from bnguard.fixes.calibration.chunks import Chunk
from bnguard.fixes.calibration.habits import Habits
from bnguard.fixes.calibration.job import Job
from bnguard.fixes.calibration.observation import differing_layers, observe
from bnguard.fixes.calibration.randomness import RandomStream
from bnguard.fixes.calibration.walks import (
    StuckError,
    Surroundings,
    Walk,
    advance_at_once,
    advance_in_turn,
)
from bnguard.moments import Moments, merge_moments

# What other chunks disturb is off by far more.
_SAME = 0.05
# So many samples of a chunk are looked at again.
_WITNESSES = 2
# A forward that takes longer waits for another, as for a lock that stands at a layer with that one.
_PATIENCE_SECONDS = 20.0
_PATIENCE_FORWARDS = 50


@dataclass(frozen=True, eq=False)
class Stand:
    """Where the chunks of a rank stand.

    Attributes:
        layers: Indices of the layers at which they stand.
        arrived: What arrived there, by the number of the chunk.
        has_ended: Whether one has gone all the way.
        trouble: Why they cannot run side by side; None where they can.
    """

    layers: frozenset[int]
    arrived: dict[int, Moments]
    has_ended: bool
    trouble: str | None


@dataclass(eq=False)
class _Way:
    """A walk through the model, for the calls of one number.

    A layer that is called several times cannot let anything pass before all its calls are there.
    So a chunk walks once for each: the second walk passes the first calls, whose outputs it does
    not need, and waits at the second ones.

    Attributes:
        walk: The walk.
        chunk: Number of its chunk.
        number: Number of the calls that it brings; it waits with the others at the last call of
            a layer that is called less often.
        calls: How often it called each layer so far.
    """

    walk: Walk
    chunk: int
    number: int
    calls: Counter[int] = field(default_factory=Counter)


class Formation:
    """The chunks of this rank, which go from layer to layer together.

    Args:
        job: What to calibrate.
        chunks: This rank's data; may be none.
        habits: How the model behaves; None where there is no data.
    """

    def __init__(self, job: Job, chunks: Sequence[Chunk], habits: Habits | None) -> None:
        self._job = job
        self._chunks = chunks
        self._calls = () if habits is None else habits.calls
        self._calls_of = Counter(self._calls)
        self._witness = None if habits is None else _witness_of(chunks, habits)
        self._met_by_witness: dict[int, list[Moments]] = {}
        self._stands_at: dict[_Way, tuple[int, Moments | None]] = {}
        self._trouble: str | None = None

        seconds = 0.0 if habits is None else habits.seconds_per_sample
        largest = max((chunk.samples for chunk in chunks), default=0)
        self._patience = _PATIENCE_SECONDS + _PATIENCE_FORWARDS * largest * seconds

        self._threads = torch.get_num_threads()
        can_run_at_once = habits is not None and habits.is_stateless and job.device.type == "cpu"
        self._width = max(1, min(self._threads, len(chunks))) if can_run_at_once else 1
        surroundings = Surroundings(self._threads // self._width)
        self._ways = {
            way.walk: way
            for number, chunk in enumerate(chunks)
            for call in range(max(self._calls_of.values(), default=1))
            for way in [_Way(_walk_of(job, chunk, surroundings), number, call)]
        }

    def arrive(self, index: int, values: Tensor) -> None:
        """Read what arrives at a layer, and stand still there; or pass a call of another walk."""
        walk = Walk.here()
        if walk is None:
            self._trouble = "the model calls BN layers in threads of its own"
            return
        way = self._ways[walk]
        call, calls = way.calls[index], max(1, self._calls_of[index])
        way.calls[index] += 1
        if call >= calls:
            self._trouble = "some batches call a layer more often than others"
        if call != min(way.number, calls - 1):
            return
        moments = None
        if call == way.number:
            moments = arrived_moments(values)
            self._look_at_witness(way, index, values)
            self._job.progress.advance(self._chunks[way.chunk].samples)
        self._stands_at[way] = (index, moments)
        walk.stop()

    def advance(self) -> Stand:
        """Let every walk go on to its next layer, or its end."""
        self._stands_at.clear()
        going = [walk for walk in self._ways if not walk.is_finished]
        try:
            if self._width > 1:
                advance_at_once(going, self._width, self._patience)
            else:
                advance_in_turn(going, self._patience)
        except StuckError as error:
            self._trouble = str(error)
        if any(walk.error is not None for walk in going):
            self._trouble = "a forward fails beside others"
        arrived: dict[int, list[Moments]] = {}
        for way in self._ways.values():
            _, moments = self._stands_at.get(way, (None, None))
            if moments is not None:
                arrived.setdefault(way.chunk, []).append(on_host(moments))
        return Stand(
            layers=frozenset(index for index, _ in self._stands_at.values()),
            arrived={chunk: merge_moments(parts) for chunk, parts in arrived.items()},
            has_ended=any(walk.is_finished for walk in self._ways),
            trouble=self._trouble,
        )

    def thin_out(self) -> None:
        """End most walks: after the last layer, one of each size sees whether more is called."""
        of_size = {self._chunks[way.chunk].samples: walk for walk, way in self._ways.items()}
        _end([walk for walk in self._ways if walk not in of_size.values()])

    def end(self) -> None:
        """End every walk where it stands."""
        _end(self._ways)
        if self._width > 1:
            torch.set_num_threads(self._threads)

    def was_disturbed(self) -> bool:
        """Return whether samples meet something else when they go through alone."""
        if self._witness is None:
            return False
        alone = observe(self._job, self._witness)
        met = {index: merge_moments(parts) for index, parts in self._met_by_witness.items()}
        return alone.calls != self._calls or bool(
            differing_layers(alone.moments, met, _SAME, self._job.noise)
        )

    def _look_at_witness(self, way: _Way, index: int, values: Tensor) -> None:
        if self._witness is not None and way.chunk == 0:
            rows = len(values) * self._witness.size // self._chunks[0].samples
            moments = arrived_moments(values[:rows])
            self._met_by_witness.setdefault(index, []).append(moments)


def _walk_of(job: Job, chunk: Chunk, surroundings: Surroundings) -> Walk:
    stream = RandomStream(chunk.whole.index, job.device)
    return Walk(partial(job.run, chunk.whole), surroundings, stream)


def _witness_of(chunks: Sequence[Chunk], habits: Habits) -> Batch | None:
    """Return the first batch, or a few samples where they are as good; None where it is alone."""
    if not chunks or len(chunks) * habits.most_calls < 2:
        return None
    first = chunks[0].batches[0]
    is_part = len(chunks[0].batches) > 1
    return first.rows(0, _WITNESSES) if habits.takes_rows and not is_part else first


def _end(walks: Iterable[Walk]) -> None:
    for walk in walks:
        walk.abandon()
    # After all have been told: one may wait for what another holds.
    for walk in walks:
        walk.join()
