"""The exact statistics with a forward for every few layers, where forwards cannot pause together.

For layers that are called several times, in another order by another batch, or not at all; and
for models that store features on themselves or start threads. Trial forwards find which layer's
input depends on which layer's statistics; each layer waits for those that it depends on, and all
that wait for no other get their statistics in the same forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from graphlib import CycleError, TopologicalSorter

import torch
from torch import Tensor

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer
from bnguard.layers.moments import Moments, merge_moments
from bnguard.layers.preserve import draw_from_seed, preserve_statistics
from bnguard.recalibration.batches import Batch
from bnguard.recalibration.lockstep import IrregularError
from bnguard.recalibration.statistics import (
    ForwardCancelled,
    Job,
    current_statistics,
    read_inputs,
    replace_statistics,
)
from bnguard.recalibration.trial_forward import (
    Observation,
    Witness,
    find_differing_layers,
    observe,
)

# A layer depends on another if its input moves by this share of a standard deviation.
_DEPENDS = 1e-4
_SAME = 2e-3
# With other statistics a forward may branch differently; it then runs again.
_MOST_ATTEMPTS = 4
# Enough samples to see which layer depends on which.
_PROBE_SAMPLES = 4


def replay(
    job: Job, chunks: Sequence[Batch], witness: Witness | None, samples: int
) -> dict[int, tuple[Moments, ...]]:
    """Set the statistics of each layer reached; return its inputs on all ranks, by its index.

    A last forward checks that the inputs of each layer are still those of its statistics.

    ``chunks`` and ``witness`` are those of this rank, which may have no data; ``samples`` counts
    all ranks.

    Raises:
        IrregularError: On every rank, if other samples disturb the witness.
        NonFiniteError: On every rank, if there is NaN or Inf in the inputs of one.
        CalibrationError: A layer depends on its own statistics, cannot hold the computed ones, or
            has other inputs each time.
    """
    if any(
        job.ranks.together(lambda: witness is not None and _is_disturbed(job, chunks[0], witness))
    ):
        raise IrregularError("samples that run together influence each other")
    seen = _observe_all(job, chunks)
    for _ in range(_MOST_ATTEMPTS):
        parts: dict[int, tuple[Moments, ...]] = {}
        met: dict[int, Moments] = {}
        generations = _sort_into_generations(job, chunks, seen)
        job.progress.start(sum(chunk.size for chunk in chunks), len(generations))
        for generation in generations:
            on_ranks = job.ranks.together(partial(_read_generation, job, chunks, generation, seen))
            for index in generation:
                parts[index] = tuple(part for rank in on_ranks for part in rank[index])
                job.set_statistics(index, parts[index], samples)
                mine = on_ranks[job.ranks.rank][index]
                met |= {index: merge_moments(mine)} if mine else {}
        seen = _observe_all(job, chunks)
        differing = partial(find_differing_layers, _pool(seen), met, _SAME, job.noise)
        unstable = set[int]().union(*job.ranks.together(differing))
        if not unstable:
            return parts
    raise CalibrationError(
        f"{job.layers[min(unstable)].name}: its inputs differ from forward to forward, so there is "
        "no single answer: use method 'precise'"
    )


def _is_disturbed(job: Job, chunk: Batch, witness: Witness) -> bool:
    joined = observe(job, chunk, witness.rows)
    return witness.is_disturbed(job, joined.calls, joined.moments)


def _observe_all(job: Job, chunks: Sequence[Batch]) -> list[Observation]:
    observed: list[Observation] = []
    job.ranks.together(lambda: observed.extend(observe(job, chunk) for chunk in chunks))
    return observed


def _pool(seen: Sequence[Observation]) -> dict[int, Moments]:
    parts: dict[int, list[Moments]] = {}
    for observation in seen:
        for index, moments in observation.moments.items():
            parts.setdefault(index, []).append(moments.on_host())
    return {index: merge_moments(found) for index, found in parts.items()}


def _sort_into_generations(
    job: Job, chunks: Sequence[Batch], seen: Sequence[Observation]
) -> list[tuple[int, ...]]:
    """Return the layers that are reached, those that depend on no later ones first.

    Raises:
        CalibrationError: A layer depends on itself.
    """
    sorter: TopologicalSorter[int] = TopologicalSorter()
    for edges in job.ranks.together(partial(_find_dependencies, job, chunks, seen)):
        for index, needed in edges.items():
            sorter.add(index, *needed)
    try:
        sorter.prepare()
    except CycleError as error:
        names = sorted({job.layers[index].name for index in error.args[1]})
        raise CalibrationError(
            f"{' and '.join(names)}: the inputs depend on the layer's own statistics, since "
            "it is called on its own output, so there is no single answer: leave the layer "
            "out, or use method 'precise'"
        ) from None
    generations = []
    while sorter.is_active():
        ready = sorter.get_ready()
        sorter.done(*ready)
        generations.append(tuple(sorted(ready)))
    return generations


def _find_dependencies(
    job: Job, chunks: Sequence[Batch], seen: Sequence[Observation]
) -> dict[int, set[int]]:
    """Return, for each layer that is reached here, the layers whose statistics reach its input."""
    needed: dict[int, set[int]] = {
        index: set() for observation in seen for index in observation.calls
    }
    ways = {observation.calls: chunk for observation, chunk in zip(seen, chunks, strict=True)}
    for calls, chunk in ways.items():
        probe, before = _choose_probe(job, chunk, calls)
        for index in set(calls):
            with perturb_statistics(job.layers[index]):
                after = observe(job, probe)
            moved = find_differing_layers(before.moments, after.moments, _DEPENDS, job.noise)
            for reached in moved:
                needed.setdefault(reached, set()).add(index)
    return needed


@contextmanager
def perturb_statistics(layer: BatchNormLayer) -> Iterator[None]:
    """Give a layer other statistics for a while, each channel others."""
    mean, var = current_statistics(layer)
    # Not all in proportion: a later normalisation would cancel that.
    factors = torch.rand(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean) + 0.5
    with preserve_statistics([layer]):
        replace_statistics(layer, mean - factors * var.sqrt(), var * factors)
        yield


def _choose_probe(job: Job, chunk: Batch, calls: tuple[int, ...]) -> tuple[Batch, Observation]:
    """Return the first samples of a chunk, or all if those make other calls; and what they meet."""
    if chunk.can_be_cut:
        few = chunk.rows(0, _PROBE_SAMPLES)
        with suppress(CalibrationError):
            seen = observe(job, few)
            if seen.calls == calls:
                return few, seen
    return chunk, observe(job, chunk)


def _read_generation(
    job: Job, chunks: Sequence[Batch], generation: tuple[int, ...], seen: Sequence[Observation]
) -> dict[int, list[Moments]]:
    """Return the inputs of the layers of a generation, in parts."""
    inputs: dict[int, list[Moments]] = {index: [] for index in generation}
    for chunk, observation in zip(chunks, seen, strict=True):
        for index, parts in _run_to_last_call(job, chunk, generation, observation).items():
            inputs[index] += parts
        job.progress.advance(chunk.size)
    return inputs


def _run_to_last_call(
    job: Job, chunk: Batch, generation: tuple[int, ...], before: Observation
) -> dict[int, list[Moments]]:
    """Run a chunk up to the last call of these layers; return their inputs, over all calls."""
    calls: dict[int, list[tuple[Moments, ...]]] = {}
    left = sum(index in generation for index in before.calls)
    if left == 0:
        return {}

    def on_input(index: int, values: Tensor) -> None:
        nonlocal left
        if index in generation:
            calls.setdefault(index, []).append(job.read_moments(values))
            left -= 1
        if left == 0 and not before.starts_threads:
            raise ForwardCancelled

    with (
        suppress(ForwardCancelled),
        draw_from_seed(chunk.index, job.device),
        read_inputs(job.layers, on_input),
    ):
        job.run(chunk)
    # Parts of the same samples belong together.
    return {
        index: [merge_moments(parts) for parts in zip(*found, strict=True)]
        for index, found in calls.items()
    }
