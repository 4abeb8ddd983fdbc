"""The exact engine: statistics of a whole calibration set, as if it were one giant batch.

In eval mode each layer's inputs depend on the new statistics of the layers before it. Batches that
can be joined go through the model as one, and each layer gets its statistics when it is called
(:mod:`lockstep`). Those that cannot be joined run side by side and wait for each other at each
layer; if they call the layers differently, :mod:`replay` needs several forwards, which take 6 to 10
times as long as waiting. A set that memory cannot hold runs as several virtual batches, whose
moments are merged.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from math import ceil

from bnguard.errors import CalibrationError
from bnguard.layers.moments import Moments
from bnguard.recalibration.batches import Batch, join_batches
from bnguard.recalibration.lockstep import IrregularError, lockstep
from bnguard.recalibration.replay import replay
from bnguard.recalibration.statistics import (
    Calibration,
    Job,
    NonFiniteError,
    Pool,
    is_precise,
)
from bnguard.recalibration.trial_forward import ForwardTraits, Witness, find_traits, observe

# A virtual batch ends at this number of chunks, each of which takes a thread.
_MOST_CHUNKS = 256
# With a tolerance, this number of samples is tried first, then twice as many, and so on.
_PILOT_SAMPLES = 128
# Samples of this size in all, and at least two, run again alone to see if others disturb them.
_WITNESS_BYTES = 2**16


def calibrate_exactly(job: Job) -> Calibration:
    """Compute the statistics as one giant batch in eval mode would give them.

    Raises:
        CalibrationError: There is no data, or the statistics cannot be computed from it.
    """
    head: list[Batch] = []
    job.ranks.together(lambda: head.extend(islice(job.batches, 1)))
    traits = job.ranks.together(lambda: find_traits(job, head[0]) if head else None)
    return _Engine(replace(job, batches=chain(head, job.batches)), traits).run()


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
        self._is_channels_last = all(each.is_channels_last for each in known)
        self._joins = all(
            each.takes_rows and not (each.reads_values or each.draws_random) for each in known
        )
        self._runs_side_by_side = all(
            each.is_regular and each.calls == known[0].calls for each in known
        )
        share = max(job.ranks.together(lambda: job.samples))
        capacity = max(1, min(job.memory // each.bytes_per_sample for each in known))
        # All of one size, so that the last one is not small.
        self._full_size = ceil(share / ceil(share / capacity))
        # The present virtual batch, in chunks that run as one; by what their batches have in common
        self._held: dict[Hashable, list[Batch]] = {}
        self._left_out = 0

    def run(self) -> Calibration:
        """Run virtual batches until the data end, or the statistics are as precise as asked."""
        job = self._job
        goal = self._full_size if job.tolerance is None else min(_PILOT_SAMPLES, self._full_size)
        pool, virtual_batches = Pool(), 0
        last: _VirtualBatch | None = None
        is_precise_enough = False
        while not is_precise_enough:
            filled = job.ranks.together(partial(self._fill, goal))
            if not any(taken for taken, _ in filled):
                break
            last = self._run_virtual_batch()
            is_precise_enough = self._is_precise_enough(pool, last)
            if any(is_full for _, is_full in filled):
                pool.add(last.inputs, last.samples, last.batches)
                virtual_batches += 1
                self._held, last = {}, None
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
            is_channels_last=self._is_channels_last,
        )

    def _fill(self, goal: int) -> tuple[int, bool]:
        """Take batches up to the goal; return how many, and whether no more fit."""
        taken, samples = 0, self._samples
        while samples < goal and not self._is_crowded:
            batch = next(self._job.batches, None)
            if batch is None:
                break
            self._hold([batch])
            samples += batch.size
            taken += 1
        return taken, samples >= self._full_size or self._is_crowded

    def _hold(self, batches: Sequence[Batch]) -> None:
        for batch in batches:
            key = batch.layout if self._joins else batch.index
            self._held.setdefault(key, []).append(batch)

    @property
    def _batches(self) -> list[Batch]:
        return [batch for chunk in self._held.values() for batch in chunk]

    @property
    def _samples(self) -> int:
        return sum(batch.size for batch in self._batches)

    @property
    def _is_crowded(self) -> bool:
        return self._runs_side_by_side and len(self._held) >= _MOST_CHUNKS

    def _is_precise_enough(self, pool: Pool, last: _VirtualBatch) -> bool:
        if self._job.tolerance is None:
            return False
        trial = Pool()
        trial.add(pool.parts)
        trial.add(last.inputs)
        return is_precise(trial.parts, self._job.tolerance)

    def _run_virtual_batch(self) -> _VirtualBatch:
        """Run batches as one giant batch, without those that bring NaN or Inf to a layer.

        Raises:
            CalibrationError: Every batch brings them, or one does and none may.
        """
        job = self._job
        where = ""
        while True:
            counts = job.ranks.together(lambda: (self._samples, len(self._batches)))
            samples, batches = (sum(column) for column in zip(*counts, strict=True))
            if samples == 0:
                raise CalibrationError(
                    f"NaN or Inf in the inputs of {where} in every batch: fix the data, or the "
                    "weights, or the statistics of layers that are not recalibrated"
                )
            try:
                return _VirtualBatch(self._run_chunks(samples), samples, batches)
            except IrregularError as error:
                self._run_differently(str(error))
            except NonFiniteError as error:
                where = job.layers[error.index].label
                if not any(job.ranks.together(partial(self._leave_out, error.index))):
                    self._run_differently(f"NaN or Inf in the inputs of {where} come and go")

    def _run_chunks(self, samples: int) -> dict[int, tuple[Moments, ...]]:
        job = self._job
        chunks = [join_batches(batches) for batches in self._chunks]
        if self._is_channels_last:
            chunks = [chunk.in_channels_last() for chunk in chunks]
        if not self._runs_side_by_side:
            are_changed = self._joins or self._is_channels_last
            return replay(job, chunks, self._witness if are_changed else None, samples)
        job.progress.start(self._samples, len(job.layers))
        return lockstep(job, chunks, self._witness, self._traits, samples)

    def _run_differently(self, trouble: str) -> None:
        """Give up what may be the trouble: the layout, other samples, forwards side by side.

        Raises:
            CalibrationError: None of that is left.
        """
        if self._is_channels_last:
            self._is_channels_last = False
        elif self._joins:
            self._joins = False
            batches, self._held = self._batches, {}
            self._hold(batches)
        elif self._runs_side_by_side:
            self._runs_side_by_side = False
        else:
            raise CalibrationError(f"{trouble}: use method 'precise'")

    def _leave_out(self, index: int) -> bool:
        """Remove the batches that bring NaN or Inf to a layer; return whether there are any."""
        kept: list[Batch] = []
        for batch in self._batches:
            moments = observe(self._job, batch).moments.get(index)
            if moments is None or moments.is_finite:
                kept.append(batch)
            else:
                self._job.refuse(batch, self._job.layers[index])
        removed = len(self._batches) - len(kept)
        self._left_out += removed
        self._held = {}
        self._hold(kept)
        return removed > 0

    @property
    def _chunks(self) -> list[list[Batch]]:
        """The batches that run as one; the first are those that most were joined in."""
        return sorted(self._held.values(), key=len, reverse=True)

    @property
    def _witness(self) -> Witness | None:
        """Samples of the first chunk as they came, to run alone; None if nothing can disturb them.

        Not from its beginning: some models let each sample depend on earlier ones alone. Nor from
        its middle, which stays in place where samples are paired in reverse order.
        """
        if not self._held or (len(self._batches) == 1 and not self._is_channels_last):
            return None
        batches = self._chunks[0]
        place = min(max(1, len(batches) // 3), len(batches) - 1)
        batch, before = batches[place], sum(batch.size for batch in batches[:place])
        count = max(2, _WITNESS_BYTES * batch.size // max(1, batch.nbytes))
        alone = batch.rows(0, count) if self._joins and batch.can_be_cut else batch
        size = sum(batch.size for batch in batches)
        return Witness(alone, before / size, (before + alone.size) / size)
