"""The exact statistics where forwards do not go side by side: a forward for every few layers.

For layers that are called several times, in another order by another batch, or not at all; and
for models that store features on themselves or start threads. Which layer's input depends on
which layer's statistics is found by trying; then each layer waits for those that it depends on,
and all that wait for no other are settled in the same forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from graphlib import CycleError, TopologicalSorter

from torch import Tensor

from bnguard.errors import CalibrationError
from bnguard.layers.moments import Moments, merge_moments
from bnguard.layers.randomness import seeded
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.layer_inputs import arrivals, arrived_moments, on_host, settle
from bnguard.recalibration.lockstep import Abandoned
from bnguard.recalibration.memory import Chunk
from bnguard.recalibration.statistics import Job, changed_statistics
from bnguard.recalibration.trial_forward import Observation, differing_layers, observe

# A layer depends on another where its input moves by this share of a standard deviation.
_DEPENDS = 1e-4
_SAME = 2e-3
# A forward may take other turns with other statistics; it then goes again with those.
_MOST_ATTEMPTS = 4
# So many samples are enough to see what depends on what.
_PROBE_SAMPLES = 4


def replay(job: Job, chunks: Sequence[Chunk], samples: int) -> dict[int, tuple[Moments, ...]]:
    """Settle every layer that is reached; return what arrived there on all ranks, by its index.

    A last forward looks whether what arrives at each layer is what it was settled from.

    Args:
        job: What to calibrate.
        chunks: This rank's data; may be none.
        samples: How many samples there are on all ranks.

    Raises:
        NonFiniteError: On every rank, where NaN or Inf arrives on one.
        CalibrationError: A layer depends on its own statistics, cannot have those computed, or
            meets something else each time.
    """
    seen = _observed(job, chunks)
    for _ in range(_MOST_ATTEMPTS):
        parts: dict[int, tuple[Moments, ...]] = {}
        met: dict[int, Moments] = {}
        generations = _generations(job, chunks, seen)
        job.progress.start(sum(chunk.whole.size for chunk in chunks), len(generations))
        for generation in generations:
            on_ranks = job.ranks.together(partial(_arrived, job, chunks, generation, seen))
            for index in generation:
                parts[index] = settle(job, index, [rank[index] for rank in on_ranks], samples)
                mine = on_ranks[job.ranks.rank][index]
                met |= {index: merge_moments(mine.values())} if mine else {}
        seen = _observed(job, chunks)
        differing = partial(differing_layers, _pooled(seen), met, _SAME, job.noise)
        unsteady = set[int]().union(*job.ranks.together(differing))
        if not unsteady:
            return parts
    raise CalibrationError(
        f"{job.layers[min(unsteady)].name}: what arrives differs from forward to forward, so there "
        "is no one answer: use method 'precise'"
    )


def _observed(job: Job, chunks: Sequence[Chunk]) -> list[Observation]:
    observed: list[Observation] = []
    job.ranks.together(lambda: observed.extend(observe(job, chunk.whole) for chunk in chunks))
    return observed


def _pooled(seen: Sequence[Observation]) -> dict[int, Moments]:
    parts: dict[int, list[Moments]] = {}
    for observation in seen:
        for index, moments in observation.moments.items():
            parts.setdefault(index, []).append(on_host(moments))
    return {index: merge_moments(found) for index, found in parts.items()}


def _generations(
    job: Job, chunks: Sequence[Chunk], seen: Sequence[Observation]
) -> list[tuple[int, ...]]:
    """Return the layers that are reached, those that depend on no later ones first.

    Raises:
        CalibrationError: A layer depends on itself.
    """
    sorter: TopologicalSorter[int] = TopologicalSorter()
    for edges in job.ranks.together(partial(_dependencies, job, chunks, seen)):
        for index, needed in edges.items():
            sorter.add(index, *needed)
    try:
        sorter.prepare()
    except CycleError as error:
        names = sorted({job.layers[index].name for index in error.args[1]})
        raise CalibrationError(
            f"{' and '.join(names)}: what arrives depends on the layer's own statistics, for it is "
            "called on what its output led to, so there is no one answer: leave the layer out, "
            "or use method 'precise'"
        ) from None
    generations = []
    while sorter.is_active():
        ready = sorter.get_ready()
        sorter.done(*ready)
        generations.append(tuple(sorted(ready)))
    return generations


def _dependencies(
    job: Job, chunks: Sequence[Chunk], seen: Sequence[Observation]
) -> dict[int, set[int]]:
    """Return, for each layer that is reached here, those whose statistics reach its input."""
    needed: dict[int, set[int]] = {
        index: set() for observation in seen for index in observation.calls
    }
    ways = {observation.calls: chunk for observation, chunk in zip(seen, chunks, strict=True)}
    for calls, chunk in ways.items():
        probe, before = _probe(job, chunk, calls)
        for index in set(calls):
            with changed_statistics(job.layers[index]):
                after = observe(job, probe)
            for reached in differing_layers(before.moments, after.moments, _DEPENDS, job.noise):
                needed.setdefault(reached, set()).add(index)
    return needed


def _probe(job: Job, chunk: Chunk, calls: tuple[int, ...]) -> tuple[Batch, Observation]:
    """Return as little of a chunk as goes the same way, and what it meets."""
    if chunk.whole.can_be_cut:
        few = chunk.whole.rows(0, _PROBE_SAMPLES)
        with suppress(CalibrationError):
            seen = observe(job, few)
            if seen.calls == calls:
                return few, seen
    return chunk.whole, observe(job, chunk.whole)


def _arrived(
    job: Job, chunks: Sequence[Chunk], generation: tuple[int, ...], seen: Sequence[Observation]
) -> dict[int, dict[int, Moments]]:
    """Return what arrives at the layers of a generation, by the number of the chunk."""
    arrived: dict[int, dict[int, Moments]] = {index: {} for index in generation}
    for number, (chunk, observation) in enumerate(zip(chunks, seen, strict=True)):
        for index, moments in _met(job, chunk, generation, observation).items():
            arrived[index][number] = moments
        job.progress.advance(chunk.whole.size)
    return arrived


def _met(
    job: Job, chunk: Chunk, generation: tuple[int, ...], before: Observation
) -> dict[int, Moments]:
    """Put a chunk through the model as far as the last call of these layers."""
    parts: dict[int, list[Moments]] = {}
    left = sum(index in generation for index in before.calls)
    if left == 0:
        return {}

    def arrive(index: int, values: Tensor) -> None:
        nonlocal left
        if index in generation:
            parts.setdefault(index, []).append(on_host(arrived_moments(values)))
            left -= 1
        if left == 0 and not before.starts_threads:
            raise Abandoned

    whole = chunk.whole
    with suppress(Abandoned), seeded(whole.index, job.device), arrivals(job.layers, arrive):
        job.run(whole)
    return {index: merge_moments(found) for index, found in parts.items()}
