"""Notes of a report: what was read in an unusual way, or could not be seen, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bnguard.findings import counted
from bnguard.layers.distances import FORGOTTEN_WEIGHT, initial_weight
from bnguard.layers.names import layer_label
from bnguard.observe.history import History, LayerHistory

# Published models have momenta between this and 0.3.
_SMALLEST_USUAL_MOMENTUM = 1e-3


def list_notes(history: History) -> Iterator[str]:
    """Yield the notes on what was observed, a line each."""
    yield from _note_sources(history)
    yield from _note_unseen(history)
    # BN101 reports a single layer that no optimizer has.
    if history.run.is_optimized is False and not any(
        layer.is_left_out and layer.is_affine_frozen and layer.updates_seen
        for layer in history.layers
    ):
        yield "the optimizer given holds none of this model's parameters"
    for unknown in history.run.unknown:
        yield (
            f"{unknown.module or 'the model'} ({unknown.kind}, {unknown.place}) normalises over "
            f"the batch and is not watched: {unknown.advice}"
        )
    lost = [layer for layer in history.layers if layer.unsaved]
    if lost:
        yield (
            f"{' and '.join(lost[0].unsaved)} of {_subject(lost)} are not in the state dict, so "
            "saving loses them: use register_buffer"
        )
    yield from _note_momentum(history)
    cost = history.run.overhead
    if cost is not None and (cost.steps_left_out or cost.evaluations_left_out):
        yield (
            f"watching took {cost.seconds:.2g} s, {cost.share:.1%} of the training's time; "
            f"to keep that low, {cost.steps_left_out:,} of {history.run.steps:,} steps and "
            f"{counted(cost.evaluations_left_out, 'evaluation')} were left out (max_overhead=0 "
            "reads all)"
        )


def _note_sources(history: History) -> Iterator[str]:
    by_source: dict[str, list[LayerHistory]] = {}
    for layer in history.layers:
        if layer.source != "buffers":
            by_source.setdefault(layer.source, []).append(layer)
    for source, layers in by_source.items():
        yield f"{_subject(layers)} read from {source}"


def _note_unseen(history: History) -> Iterator[str]:
    """Yield which calls, steps and evaluations were not seen."""
    layers, steps = history.layers, history.run.steps
    unseen = [layer for layer in layers if layer.unseen_calls]
    if unseen:
        yield (
            f"{_subject(unseen)} called without hooks, as under torch.compile: values per "
            "channel, streams and eval statistics are unknown"
        )
    if not steps and any(layer.calls.in_training for layer in layers):
        yield "no training step was noticed: call monitor.step() after each one"
    elif (
        steps
        and not unseen
        and not any(layer.evaluated or layer.calls.left_out for layer in layers)
    ):
        was_tried = any(layer.calls.in_evaluation for layer in layers)
        nothing = "no evaluation (eval mode, no_grad) was seen"
        what = "evaluation ran in train mode" if was_tried else nothing
        yield f"{what}, so BN301, BN302 and BN305 were not judged"


def _note_momentum(history: History) -> Iterator[str]:
    """Yield the assumed momentum, if another usual value would lead to another conclusion."""
    undecided = [
        (layer.running.updates, layer)
        for layer in history.layers
        if layer.running is not None
        and layer.running.updates is not None
        and not layer.is_momentum_known
        and layer.initial_weight is not None
        and layer.initial_weight <= FORGOTTEN_WEIGHT
        and initial_weight(_SMALLEST_USUAL_MOMENTUM, layer.running.updates) > FORGOTTEN_WEIGHT
    ]
    if undecided:
        fewest = min(updates for updates, _ in undecided)
        needed = 1.0 - FORGOTTEN_WEIGHT ** (1.0 / fewest)
        yield (
            f"momentum is not stored, and 0.1 is assumed; if it was below {needed:.2g}, the "
            f"{fewest:,} updates of {_subject([layer for _, layer in undecided])} were too few"
        )


def _subject(layers: Sequence[LayerHistory]) -> str:
    """Return layers as the subject of a sentence."""
    first = layers[0].name
    if len(layers) == 1:
        return layer_label(first) if first else "the layer"
    return f"{len(layers)} layers, {layer_label(first)} first,"
