"""The original network teaches the swapped one: where, and with which running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import device_of, find_layers
from bnguard.layers.preserve import preserve_modes
from bnguard.recalibration.api import recalibrate
from bnguard.recalibration.batches import Forward
from bnguard.swapping.distillation import Distillation, distil

# Statistics further off than this teach nonsense: standard deviations, or a log-variance ratio.
# Healthy networks of the benchmark stay below 0.2.
_MAX_STATISTICS_DISTANCE = 1.5
_SAMPLES_TO_CHECK = 256
_MIN_SAMPLES_TO_CHECK = 32


def teach(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[object],
    *,
    pairs: Sequence[tuple[nn.Module, nn.Module]],
    steps: int,
    forward: Forward | None,
    engine: Any,
    progress: bool,
) -> tuple[Distillation, tuple[str, ...]]:
    """Distil a network into its swapped copy, from running statistics that fit the data.

    Args:
        student: The swapped network; its weights change.
        teacher: A copy of the original, whose statistics may be recalibrated.
        data: Batches, which can be read more than once.
        pairs: Layers of the student and the teacher whose outputs are to agree.
        steps: Optimizer steps at most.
        forward: ``forward(model, batch)`` calls a model; None if the batch says how.
        engine: Lightning's ``Fabric``, or :class:`~bnguard.swapping.distillation.OwnDevice`.
        progress: Whether to show a progress bar.

    Returns:
        How it went, and what a reader should know besides.
    """
    with _on_device_of(engine, student):
        engine.to_device(teacher)
        notes = _fit_statistics(teacher, data, forward)
        if notes:
            _copy_statistics(pairs)
        with _progress_bar(steps, is_shown=progress and engine.is_global_zero) as show_progress:
            distillation = distil(
                student,
                teacher,
                data,
                pairs=pairs,
                steps=steps,
                forward=forward,
                engine=engine,
                show_progress=show_progress,
            )
    return distillation, notes


def _fit_statistics(
    teacher: nn.Module, data: Iterable[object], forward: Forward | None
) -> tuple[str, ...]:
    """Recalibrate a teacher whose running statistics do not fit the data, and say so."""
    if not any(layer.is_tracking for layer in find_layers(teacher)):
        return ()
    with preserve_modes(teacher):
        teacher.eval()
        try:
            found = recalibrate(
                teacher, data, samples=_SAMPLES_TO_CHECK, forward=forward, progress=False
            )
        except CalibrationError as error:
            return (f"the running statistics of the teacher could not be checked: {error}",)
    worst = max(found.layers, key=lambda layer: layer.distance)
    if worst.distance <= _MAX_STATISTICS_DISTANCE or found.samples < _MIN_SAMPLES_TO_CHECK:
        found.undo()
        return ()
    return (
        f"the running statistics did not fit these data (the worst: {worst.name}), so they "
        "were recalibrated before the model taught",
    )


@contextmanager
def _on_device_of(engine: Any, model: nn.Module) -> Iterator[None]:
    """Hold a model where the engine computes; move it back at the end."""
    home = device_of(model)
    engine.to_device(model)
    try:
        yield
    finally:
        if device_of(model) != home:
            model.to(home)


@torch.no_grad()
def _copy_statistics(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Give the student's layers that keep running statistics those of their teacher."""
    for layer, taught_by in pairs:
        for name in ("running_mean", "running_var"):
            own, other = getattr(layer, name, None), getattr(taught_by, name, None)
            if own is not None and other is not None:
                own.copy_(other)


@contextmanager
def _progress_bar(steps: int, *, is_shown: bool) -> Iterator[Callable[[int, float], None]]:
    """Show a progress bar if there is a terminal, and yield what moves it."""
    if not is_shown:
        yield lambda step, distance: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("distilling"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} steps, {task.description}"),
        TimeRemainingColumn(),
        transient=True,
    )
    bar.disable = not bar.console.is_terminal
    task = bar.add_task("", total=steps)
    with bar:
        yield lambda step, distance: bar.update(
            task, completed=step, description=f"{distance:.3g} σ off"
        )
