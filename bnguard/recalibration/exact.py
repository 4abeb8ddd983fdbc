"""The exact engine: statistics of a whole calibration set, as if it were one giant batch.

In eval mode each layer's inputs depend on the new statistics of the layers before it.
:mod:`lockstep` computes them in one forward if batches can go through the layers side by side,
:mod:`replay` in several if they cannot. A set that memory cannot hold runs as several virtual
batches, whose moments are merged.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from math import ceil

from bnguard.errors import CalibrationError
from bnguard.layers.moments import Moments
from bnguard.recalibration.batches import Batch, can_be_joined, join_batches
from bnguard.recalibration.lockstep import DivergingError, IrregularError, lockstep
from bnguard.recalibration.replay import replay
from bnguard.recalibration.statistics import Calibration, Job, NonFiniteError, Pool, is_precise
from bnguard.recalibration.trial_forward import ForwardTraits, call_same_layers, find_traits

# Each chunk is a thread: above this number, batches are joined so that there are fewer, ...
_USUAL_CHUNKS = 64
_MIN_JOINED_SAMPLES = 32
# ... and if they cannot be joined, a virtual batch ends at this number of threads.
_MOST_CHUNKS = 256
# With a tolerance, this number of samples is tried first, then twice as many, and so on.
_PILOT_SAMPLES = 128


def calibrate_exactly(job: Job) -> Calibration:
    """Compute the statistics as one giant batch in eval mode would give them.

    Raises:
        CalibrationError: There is no data, or the statistics cannot be computed from it.
    """
    head: list[Batch] = []
    job.ranks.together(lambda: head.extend(islice(job.batches, 2)))
    traits = job.ranks.together(lambda: find_traits(job, head) if head else None)
    return _Engine(replace(job, batches=chain(head, job.batches)), traits).run()


class ChunkedBatches:
    """Batches in chunks, each batch in one of its own until they are joined."""

    def __init__(self) -> None:
        self._min_samples = 1
        self.chunks: list[tuple[Batch, ...]] = []

    @property
    def batches(self) -> list[Batch]:
        """The batches as they came."""
        return [batch for chunk in self.chunks for batch in chunk]

    @property
    def samples(self) -> int:
        """Samples in all batches."""
        return sum(batch.size for batch in self.batches)

    def join(self, min_samples: int) -> None:
        """Join neighbours of equal shapes, later ones too, until a chunk has enough samples."""
        self._min_samples = min_samples
        batches, self.chunks = self.batches, []
        for batch in batches:
            self.append(batch)

    def append(self, batch: Batch) -> None:
        """Put a batch into the last chunk, or into one of its own."""
        last = self.chunks[-1] if self.chunks else ()
        is_open = 0 < sum(each.size for each in last) < self._min_samples
        if is_open and can_be_joined(last[-1], batch):
            self.chunks[-1] = (*last, batch)
        else:
            self.chunks.append((batch,))

    def remove(self, numbers: Collection[int]) -> list[Batch]:
        """Split these chunks into their batches; remove and return those that are one batch."""
        kept: list[tuple[Batch, ...]] = []
        removed: list[Batch] = []
        for number, chunk in enumerate(self.chunks):
            if number not in numbers:
                kept.append(chunk)
            elif len(chunk) > 1:
                kept += [(batch,) for batch in chunk]
            else:
                removed += chunk
        self.chunks = kept
        return removed


@dataclass(frozen=True, eq=False)
class _VirtualBatch:
    """Moments of the inputs of each layer, by its index, over the samples of all ranks."""

    inputs: dict[int, tuple[Moments, ...]]
    samples: int
    batches: int


class _Engine:
    """Runs virtual batches, and remembers which ways of running them failed before.

    Args:
        job: What to calibrate.
        traits: How the model behaves on the data of each rank; None for a rank without data.
    """

    def __init__(self, job: Job, traits: Sequence[ForwardTraits | None]) -> None:
        known = [each for each in traits if each is not None]
        if not known:
            raise CalibrationError("the loader is empty: it yields no sample to calibrate on")
        self._job = job
        self._traits = traits[job.ranks.rank]
        self._runs_side_by_side = all(
            each.is_regular and each.calls == known[0].calls for each in known
        )
        share = max(job.ranks.together(lambda: job.samples))
        capacity = max(1, min(job.memory // each.bytes_per_sample for each in known))
        # All of one size, so that the last one is not small.
        self._full_size = ceil(share / ceil(share / capacity))
        self._may_join = all(each.takes_rows for each in known)
        self._has_compared_calls = False
        self._left_out = 0

    def run(self) -> Calibration:
        """Run virtual batches until the data end, or the statistics are as precise as asked."""
        job = self._job
        goal = self._full_size if job.tolerance is None else min(_PILOT_SAMPLES, self._full_size)
        held, pool, virtual_batches = ChunkedBatches(), Pool(), 0
        last: _VirtualBatch | None = None
        is_precise_enough = False
        while not is_precise_enough:
            filled = job.ranks.together(partial(self._fill, held, goal))
            if not any(taken for taken, _ in filled):
                break
            last = self._run_virtual_batch(held)
            is_precise_enough = self._is_precise_enough(pool, last)
            if any(is_full for _, is_full in filled):
                pool.add(last.inputs, last.samples, last.batches)
                virtual_batches += 1
                held, last = ChunkedBatches(), None
            goal = min(2 * goal, self._full_size)
        if last is not None:
            pool.add(last.inputs, last.samples, last.batches)
            virtual_batches += 1
        return Calibration(
            estimates=job.estimate_from(pool),
            samples=pool.samples,
            batches=pool.batches,
            virtual_batches=virtual_batches,
            left_out=sum(job.ranks.together(lambda: self._left_out)),
            is_within_tolerance=is_precise_enough,
        )

    def _fill(self, held: ChunkedBatches, goal: int) -> tuple[int, bool]:
        """Take batches up to the goal; return how many, and whether no more fit."""
        taken = 0
        while held.samples < goal and not self._is_crowded(held):
            batch = next(self._job.batches, None)
            if batch is None:
                break
            held.append(batch)
            taken += 1
            if len(held.chunks) > _USUAL_CHUNKS and self._can_join(held):
                held.join(max(_MIN_JOINED_SAMPLES, ceil(goal / _USUAL_CHUNKS)))
        return taken, held.samples >= self._full_size or self._is_crowded(held)

    def _can_join(self, held: ChunkedBatches) -> bool:
        """Return whether batches may be joined; before the first time, compare their calls."""
        if self._may_join and not self._has_compared_calls and self._traits is not None:
            self._may_join = call_same_layers(self._job, held.batches, self._traits.calls)
            self._has_compared_calls = True
        return self._may_join

    def _is_crowded(self, held: ChunkedBatches) -> bool:
        return self._runs_side_by_side and len(held.chunks) >= _MOST_CHUNKS

    def _is_precise_enough(self, pool: Pool, last: _VirtualBatch) -> bool:
        if self._job.tolerance is None:
            return False
        trial = Pool()
        trial.add(pool.parts)
        trial.add(last.inputs)
        return is_precise(trial.parts, self._job.tolerance)

    def _run_virtual_batch(self, held: ChunkedBatches) -> _VirtualBatch:
        """Run batches as one giant batch, without those that bring NaN or Inf to a layer.

        Raises:
            CalibrationError: Every batch brings them, or one does and none may.
        """
        job = self._job
        where = ""
        while True:
            counts = job.ranks.together(lambda: (held.samples, len(held.batches)))
            samples, batches = (sum(column) for column in zip(*counts, strict=True))
            if samples == 0:
                raise CalibrationError(
                    f"NaN or Inf in the inputs of {where} in every batch: fix the data, or the "
                    "weights and statistics that stay as they are"
                )
            try:
                return _VirtualBatch(self._run_chunks(held, samples), samples, batches)
            except IrregularError as error:
                self._runs_side_by_side = False
                if isinstance(error, DivergingError):
                    self._may_join = False
                    held.join(1)
            except NonFiniteError as error:
                where = job.layers[error.index].name
                job.ranks.together(partial(self._leave_out, held, error))

    def _run_chunks(self, held: ChunkedBatches, samples: int) -> dict[int, tuple[Moments, ...]]:
        job, traits = self._job, self._traits
        chunks = [join_batches(chunk) for chunk in held.chunks]
        if traits is not None and traits.is_channels_last:
            chunks = [chunk.in_channels_last() for chunk in chunks]
        if not self._runs_side_by_side:
            return replay(job, chunks, samples)
        job.progress.start(held.samples, len(job.layers))
        return lockstep(job, chunks, traits, samples)

    def _leave_out(self, held: ChunkedBatches, error: NonFiniteError) -> None:
        for batch in held.remove(error.chunks):
            self._job.refuse(batch, self._job.layers[error.index])
            self._left_out += 1
