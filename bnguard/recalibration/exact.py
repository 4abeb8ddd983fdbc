"""The exact engine: statistics of a whole calibration set, as if it were one giant batch.

In eval mode each layer must be computed from inputs that the new statistics upstream have
normalised. :mod:`lockstep` does that in one forward where batches go through the layers side by
side, :mod:`replay` in several where they do not. What memory cannot hold runs as several virtual
batches, whose moments are merged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from math import ceil

from bnguard.errors import CalibrationError
from bnguard.layers.moments import Moments
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.layer_inputs import DivergingError, IrregularError, NonFiniteError
from bnguard.recalibration.lockstep import lockstep
from bnguard.recalibration.memory import Chunk, ChunkedBatches
from bnguard.recalibration.replay import replay
from bnguard.recalibration.statistics import Calibration, Job, Pool, is_precise
from bnguard.recalibration.trial_forward import ForwardTraits, call_same_layers, find_traits

# Each chunk is a thread: more batches than so many are joined so that there are fewer, ...
_USUAL_CHUNKS = 64
_MIN_JOINED_SAMPLES = 32
# ... and where they cannot be joined, a virtual batch of as many threads ends at so many.
_MOST_CHUNKS = 256
# With a tolerance, so many samples are tried first, then twice as many, and so on.
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


@dataclass(frozen=True, eq=False)
class _VirtualBatch:
    """Moments of the inputs of each layer, by its index, over the samples of all ranks."""

    inputs: dict[int, tuple[Moments, ...]]
    samples: int
    batches: int


@dataclass(frozen=True)
class _Filled:
    """How many batches a rank took, and whether it is full."""

    taken: int
    is_full: bool


@dataclass
class _Tally:
    """What finished virtual batches add up to."""

    pool: Pool = field(default_factory=Pool)
    samples: int = 0
    batches: int = 0
    virtual_batches: int = 0

    def add(self, virtual_batch: _VirtualBatch) -> None:
        self.pool.add(virtual_batch.inputs)
        self.samples += virtual_batch.samples
        self.batches += virtual_batch.batches
        self.virtual_batches += 1


class _Engine:
    """Runs virtual batches, and remembers which ways of running them failed before.

    Args:
        job: What to calibrate.
        traits: How the model behaves on the data of each rank; None for one without data.
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
        self._is_followed = False
        self._left_out = 0

    def run(self) -> Calibration:
        """Run virtual batches until the data end, or the statistics are as precise as asked for."""
        job, tally = self._job, _Tally()
        goal = self._full_size if job.tolerance is None else min(_PILOT_SAMPLES, self._full_size)
        held = self._no_batches()
        last: _VirtualBatch | None = None
        is_precise_enough = False
        while not is_precise_enough:
            filled = job.ranks.together(partial(self._fill, held, goal))
            if not any(each.taken for each in filled):
                break
            last = self._run_virtual_batch(held)
            is_precise_enough = self._is_precise_enough(tally, last)
            if any(each.is_full for each in filled):
                tally.add(last)
                held, last = self._no_batches(), None
            goal = min(2 * goal, self._full_size)
        if last is not None:
            tally.add(last)
        return Calibration(
            estimates={
                job.layers[index].name: job.estimate(job.layers[index], moments, tally.samples)
                for index, moments in tally.pool.merged().items()
            },
            samples=tally.samples,
            batches=tally.batches,
            virtual_batches=tally.virtual_batches,
            left_out=sum(job.ranks.together(lambda: self._left_out)),
            is_within_tolerance=is_precise_enough,
        )

    def _no_batches(self) -> ChunkedBatches:
        traits = self._traits
        return ChunkedBatches(is_channels_last=traits is not None and traits.is_channels_last)

    def _fill(self, held: ChunkedBatches, goal: int) -> _Filled:
        """Take batches until the goal or the limit of chunks is reached."""
        taken = 0
        while held.samples < goal and not self._is_crowded(held):
            batch = next(self._job.batches, None)
            if batch is None:
                break
            held.append(batch)
            taken += 1
            if len(held.chunks) > _USUAL_CHUNKS and self._can_join(held):
                held.join(max(_MIN_JOINED_SAMPLES, ceil(goal / _USUAL_CHUNKS)))
        return _Filled(taken, held.samples >= self._full_size or self._is_crowded(held))

    def _can_join(self, held: ChunkedBatches) -> bool:
        """Return whether batches may be joined; a few are followed before the first time."""
        if self._may_join and not self._is_followed and self._traits is not None:
            self._may_join = call_same_layers(self._job, held.apart, self._traits.calls)
            self._is_followed = True
        return self._may_join

    def _is_crowded(self, held: ChunkedBatches) -> bool:
        return self._runs_side_by_side and len(held.chunks) >= _MOST_CHUNKS

    def _is_precise_enough(self, tally: _Tally, last: _VirtualBatch) -> bool:
        if self._job.tolerance is None:
            return False
        trial = Pool()
        trial.add(tally.pool.parts)
        trial.add(last.inputs)
        return is_precise(trial.parts, self._job.tolerance)

    def _run_virtual_batch(self, held: ChunkedBatches) -> _VirtualBatch:
        """Run batches as one giant batch, without those that bring NaN or Inf to a layer.

        Raises:
            CalibrationError: All do, or one of them where none may.
        """
        job = self._job
        where = ""
        while True:
            counts = job.ranks.together(lambda: (held.samples, held.batches))
            samples, batches = (sum(column) for column in zip(*counts, strict=True))
            if samples == 0:
                raise CalibrationError(
                    f"NaN or Inf in the inputs of {where} in every batch: fix the data, or the "
                    "weights and statistics that stay as they are"
                )
            try:
                inputs = self._run_chunks(held.chunks, samples)
            except IrregularError as error:
                self._runs_side_by_side = False
                if isinstance(error, DivergingError):
                    self._may_join = False
                    held.join(1)
            except NonFiniteError as error:
                where = job.layers[error.index].name
                job.ranks.together(partial(self._leave_out, held, error))
            else:
                return _VirtualBatch(inputs, samples, batches)

    def _run_chunks(self, chunks: Sequence[Chunk], samples: int) -> dict[int, tuple[Moments, ...]]:
        job = self._job
        if not self._runs_side_by_side:
            return replay(job, chunks, samples)
        job.progress.start(sum(chunk.samples for chunk in chunks), len(job.layers))
        return lockstep(job, chunks, self._traits, samples)

    def _leave_out(self, held: ChunkedBatches, error: NonFiniteError) -> None:
        for batch in held.remove(error.chunks):
            self._job.refuse(batch, self._job.layers[error.index])
            self._left_out += 1
