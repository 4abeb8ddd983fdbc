"""`diagnose`: measure one model under other statistics, and find the cause."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bnguard.distributed import Ranks
from bnguard.errors import CalibrationError, ConfigurationError
from bnguard.layers.bn_layer import (
    BatchNormLayer,
    device_of,
    explain_missing_layers,
    find_layers,
    require_module,
    run_uncompiled,
)
from bnguard.layers.distances import initial_weight
from bnguard.layers.preserve import preserve_modes, preserve_random_states, preserve_statistics
from bnguard.recalibration.batches import Forward
from bnguard.recalibration.options import (
    Score,
    is_whole,
    require_samples,
    require_score,
    require_values,
    select_layers,
    unwrap,
)
from bnguard.recalibration.statistics import copy_statistics
from bnguard.whatif.bench import Bench, Statistics
from bnguard.whatif.causes import no_statistics, reach_verdict
from bnguard.whatif.cures import Cure, average_over_batches, blame_layers, compute_cure
from bnguard.whatif.evidence import (
    MAX_STORED_DRIFT,
    Numbers,
    read_dropout,
    read_training,
)
from bnguard.whatif.result import Diagnosis, LayerShare
from bnguard.whatif.samples import Samples, read_samples
from bnguard.whatif.table import Table, measure_drift, measure_table


def diagnose(
    model: nn.Module,
    loader: Iterable[object],
    reference: Iterable[object] | None = None,
    score: Score | None = None,
    *,
    samples: int = 1024,
    forward: Forward | None = None,
    batch_sizes: Sequence[int] = (2, 8, 32),
    expected_score: float | Callable[[], float] | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Try the model with other BN statistics, and name the cause that the results show.

    The model runs in eval mode with its own statistics, with statistics recalibrated on the
    training data and on the evaluation data, and with each batch normalised by its own, at several
    batch sizes. If one of these is a cure, bisection finds the layers that need it. The model is
    left untouched, also after an exception.

    Args:
        model: The model, in any mode. Layers in eval mode in a model in train mode are frozen,
            and keep their statistics throughout.
        loader: The evaluation data: tensors; tuples or lists, whose first item is the input; or
            mappings, whose entries that the forward has parameters for are the input. It is read
            once.
        reference: The training data, in the batches of training; distinguishes stale statistics
            from data that differ.
        score: ``score(model)`` returns how good the model is on the evaluation data, the higher the
            better. Without it, outputs are compared with those under the statistics of the
            evaluation data.
        samples: Samples to use at most, of each loader.
        forward: ``forward(model, batch)`` calls the model if the loaders yield anything else.
        batch_sizes: Further sizes at which batches are normalised by their own statistics.
        expected_score: What the score should be, for example that of training: if no statistics
            reach it, the model is to blame. A function is called once the model has been scored.
        progress: Show a progress bar in a terminal while recalibrating.

    Returns:
        The table, the verdict, the layers to blame, and what to do next. It prints itself.

    Raises:
        CalibrationError: There are no BN layers, no data, or the model fails on them.
        ConfigurationError: An option does not fit.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        >>> diagnosis = diagnose(model, (3 + torch.randn(256, 4)).split(32))
        >>> diagnosis.cause.name, [row.name for row in diagnosis.rows][:3]
        ('unconverged-statistics', ['stored', 'evaluation', 'batches'])
    """
    require_module(model, "diagnose")
    _check_options(samples, batch_sizes, score, expected_score)
    inner = unwrap(model)
    found = find_layers(inner)
    if not found:
        raise CalibrationError(f"{explain_missing_layers(inner)}: nothing to diagnose")
    for layer in found:
        require_values(layer)
    if not any(layer.is_tracking for layer in found):
        return Diagnosis(cause=no_statistics(found))
    selection = select_layers(inner, None)
    layers = selection.layers
    with (
        preserve_modes(model),
        preserve_random_states(model),
        preserve_statistics(layers),
        run_uncompiled(),
        torch.no_grad(),
    ):
        _check_weights(inner)
        read = partial(
            read_samples, model=inner, forward=forward, samples=samples, device=device_of(inner)
        )
        evaluation = read(loader, name="loader")
        training = None if reference is None else read(reference, name="reference")
        # In the modes that the user holds the layers in: frozen ones keep their statistics.
        cure = partial(compute_cure, inner, layers, forward=forward, progress=progress)
        by_training = None if training is None else cure(training)
        by_evaluation = cure(evaluation)
        model.eval()
        bench = Bench(
            model=model,
            inner=inner,
            layers=layers,
            untracked=[layer for layer in found if not layer.is_tracking],
            forward=forward,
            score=score,
            samples=evaluation,
        )
        bench = _without_left_out(bench, by_evaluation)
        stored = {layer.name: copy_statistics(layer) for layer in layers}
        cures: dict[str, Cure] = {}
        shown, averaged, on_data = None, None, bench
        if training is not None and by_training is not None:
            on_data = replace(bench, score=None, samples=training)
            on_data = _without_left_out(on_data, by_training)
            averaged, outputs = average_over_batches(on_data, stored)
            cures["reference"] = by_training
            if averaged.changes:
                cures["averaged"] = averaged
            shown = read_training(on_data, by_training, averaged, outputs)
        cures["evaluation"] = by_evaluation
        statistics = {name: each.statistics for name, each in cures.items()}
        table = measure_table(bench, stored, statistics, batch_sizes)
        fresh = cures.get("reference", by_evaluation)
        numbers = replace(
            _numbers(bench, table, stored, fresh),
            training=shown,
            dropout=read_dropout(on_data, stored, averaged),
            expected_score=expected_score() if callable(expected_score) else expected_score,
        )
        cause = reach_verdict(numbers)
        blamed: tuple[LayerShare, ...] = ()
        if cause.cured_by is not None:
            blamed = blame_layers(bench, cures, cause.cured_by, table.measured)
    return Diagnosis(
        rows=tuple(table.rows.values()),
        cause=cause,
        layers=blamed,
        skipped=selection.skipped,
        samples=len(bench.samples),
        reference_samples=0 if training is None else len(training),
        notes=(*_notes(cures, evaluation, training), *table.notes),
    )


def _without_left_out(bench: Bench, cure: Cure) -> Bench:
    """Return a bench without the batches that a cure, computed from its samples, left out."""
    return bench.without_nonfinite_batches(cure.statistics) if cure.left_out else bench


def _numbers(bench: Bench, table: Table, stored: Statistics, fresh: Cure) -> Numbers:
    """Return what was measured on the evaluation data.

    ``fresh`` are the statistics of the training data, or of the evaluation data without any.
    """
    reached = table.measured["stored"].inputs
    drifts = [
        measure_drift(fresh.changes[name]).largest for name in reached if name in fresh.changes
    ]
    fits = all(drift <= MAX_STORED_DRIFT for drift in drifts)
    return Numbers(
        rows=table.rows,
        samples=len(bench.samples),
        batch_size=bench.samples.batch_size,
        changed_share=table.changed_share,
        orders=table.orders,
        poisoned=tuple(
            name for name, given in stored.items() if given.bad_channels or (given.var < 0.0).any()
        ),
        untouched=tuple(name for name in reached if stored[name].is_initial),
        # Statistics that fit the data are not initial, whatever their counter says.
        initial_weight=max(
            (_initial_weight(layer, stored) for layer in bench.layers if layer.name in reached),
            default=0.0,
        )
        * (not fits),
        drifts=drifts,
    )


def _initial_weight(layer: BatchNormLayer, stored: Statistics) -> float:
    """Return the weight that (0, 1) still has; 0 if the counter cannot tell."""
    given = stored[layer.name]
    if given.is_initial:
        return 1.0
    return (
        initial_weight(layer.momentum, given.updates) if given.updates and layer.momentum else 0.0
    )


def _notes(
    cures: Mapping[str, Cure], evaluation: Samples, training: Samples | None
) -> Iterator[str]:
    names = {"reference": "training data", "evaluation": "evaluation data"}
    for row, name in names.items():
        if row in cures:
            yield from (f"{name}: {note}" for note in cures[row].notes)
    order = evaluation.order()
    if order is not None and order.is_sorted:
        yield f"evaluation batches {order}: they are sorted, and later ones may differ"
    if training is None:
        yield (
            "without reference data there is no row for the training data, which distinguishes "
            "stale statistics from data that differ"
        )


def _check_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not is_lazy(parameter) and not bool(torch.isfinite(parameter).all()):
            raise CalibrationError(
                f"{name} contains NaN or Inf, which BN statistics cannot repair: load other weights"
            )


def _check_options(
    samples: int, batch_sizes: Sequence[int], score: Score | None, expected_score: object
) -> None:
    require_samples(samples, 2)
    require_score(score)
    numbers = tuple(batch_sizes) if isinstance(batch_sizes, Iterable) else (0,)
    if not all(is_whole(number, 1) for number in numbers):
        raise ConfigurationError(f"batch sizes {batch_sizes!r} are not whole numbers of at least 1")
    if expected_score is not None and score is None:
        raise ConfigurationError("an expected score needs a score to compare with")
    if Ranks().size > 1:
        raise ConfigurationError("diagnose runs on one process: call it before the others start")
