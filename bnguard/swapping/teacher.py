"""The original network teaches the swapped one: on which device, and in which mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from bnguard.distributed import Ranks
from bnguard.errors import CalibrationError, LoaderError
from bnguard.layers.bn_layer import BatchNormLayer, device_of, find_layers
from bnguard.layers.moments import values_per_channel
from bnguard.layers.names import layer_label
from bnguard.layers.preserve import preserve_random_states, preserve_statistics
from bnguard.observe.mode_gap import float_tensors, join_rows, places_of_rows, relative_change
from bnguard.recalibration.api import measure_score, recalibrate
from bnguard.recalibration.batches import Forward, call, read_batches
from bnguard.recalibration.options import Score
from bnguard.report.views import importing_rich
from bnguard.swapping.distillation import Distillation, distil
from bnguard.swapping.imitation import Pair

# Statistics further off than this teach nonsense: standard deviations, or a log-variance ratio.
# Healthy networks of the benchmark stay below 0.2.
_MAX_STATISTICS_DISTANCE = 1.5
# Change of the outputs between the modes, sampling taken off: healthy networks stay below 0.18.
_MAX_MODE_GAP = 0.25
_SAMPLES_TO_CHECK = 256
_MIN_SAMPLES_TO_CHECK = 32


@dataclass(frozen=True)
class Taught:
    """How the teaching went; the score is the teacher's, in the mode in which it taught."""

    distillation: Distillation
    notes: tuple[str, ...]
    score: float | None


class OwnDevice:
    """The part of Lightning's ``Fabric`` that a distillation uses, on the device of a model.

    Attributes:
        device: Device of the model's first parameter.
        world_size: Number of ranks of ``torch.distributed``.
        is_global_zero: Whether this is the rank that shows the progress.
    """

    def __init__(self, model: nn.Module) -> None:
        self.device = device_of(model)
        ranks = Ranks()
        self.world_size = ranks.size
        self.is_global_zero = ranks.rank == 0

    def to_device(self, module: nn.Module) -> nn.Module:
        """Return the module, which is there; its parts may be on several devices."""
        return module

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context that changes nothing."""
        return nullcontext()

    def setup_optimizers(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer itself."""
        return optimizer

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the mean over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values / self.world_size

    def broadcast(self, value: object) -> object:
        """Return the value of the first rank."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def clip_gradients(
        self, module: nn.Module, optimizer: Optimizer, *, max_norm: float, error_if_nonfinite: bool
    ) -> Tensor:
        """Scale the gradients down to a norm, and return the norm that they had."""
        return nn.utils.clip_grad_norm_(
            module.parameters(), max_norm, error_if_nonfinite=error_if_nonfinite
        )


def teach(
    student: nn.Module,
    teacher: nn.Module,
    data: Iterable[object],
    *,
    pairs: Sequence[Pair],
    chooses_groups: bool,
    steps: int,
    forward: Forward | None,
    score: Score | None,
    engine: Any,
    progress: bool,
) -> Taught:
    """Distil a network into its swapped copy, in the mode in which the network works.

    The score decides which mode that is. The statistics of the teacher, a copy of the original, may
    be recalibrated. All else is as for :func:`~bnguard.swapping.distillation.distil`.
    """
    with _on_device_of(engine, student):
        engine.to_device(teacher)
        notes = _choose_mode(teacher, data, forward, score)
        score_of_teacher = None if score is None else measure_score(teacher, score)
        _copy_statistics(pairs)
        with _progress_bar(steps, is_shown=progress and engine.is_global_zero) as show_progress:
            distillation = distil(
                student,
                teacher,
                data,
                pairs=pairs,
                chooses_groups=chooses_groups,
                steps=steps,
                forward=forward,
                engine=engine,
                show_progress=show_progress,
            )
    return Taught(distillation, notes, score_of_teacher)


def _choose_mode(
    teacher: nn.Module, data: Iterable[object], forward: Forward | None, score: Score | None
) -> tuple[str, ...]:
    """Put a teacher into the mode in which it works, and return what a reader should know of it.

    Running statistics that do not fit the data are recalibrated. If the outputs still differ from
    those with batch statistics, the network learned to work with the statistics of small batches:
    then its BN layers use those. A score, if there is one, decides both.
    """
    if not any(layer.is_tracking for layer in find_layers(teacher)):
        teacher.eval()
        return ()
    score_as_is = None if score is None else measure_score(teacher, score)
    try:
        # In the modes of the model: layers that are frozen in it stay as they are.
        found = recalibrate(
            teacher, data, samples=_SAMPLES_TO_CHECK, forward=forward, progress=False
        )
    except LoaderError:
        raise
    except CalibrationError as error:
        return (f"the running statistics of the teacher could not be checked: {error}",)
    finally:
        teacher.eval()
    if found.samples < _MIN_SAMPLES_TO_CHECK:
        found.undo()
        return ()
    notes = []
    worst = max(found.layers, key=lambda layer: layer.distance)
    is_off = worst.distance > _MAX_STATISTICS_DISTANCE
    if is_off and (
        score is None or score_as_is is None or measure_score(teacher, score) > score_as_is
    ):
        notes.append(
            "the running statistics did not fit these data (worst at "
            f"{layer_label(worst.name)}), so they were recalibrated before the model taught"
        )
    else:
        found.undo()
    gap = found.mode_gap_after
    if isinstance(gap, str):
        return tuple(notes)
    change = gap.relative_change - (gap.sampling_change or 0.0)
    # Eval mode of a network that was trained with large batches works, though a small batch of
    # them gives other outputs. Then its running statistics are right, or a score says so.
    if is_off or score is not None:
        change = max(change, _change_of_small_batches(teacher, data, forward))
    if change <= _MAX_MODE_GAP:
        return tuple(notes)
    score_in_eval_mode = None if score is None else measure_score(teacher, score)
    undo = _use_batch_statistics([layer for layer in find_layers(teacher) if layer.is_tracking])
    if score is None or score_in_eval_mode is None:
        why = (
            f"eval mode changes the outputs by {change:.2g} σ, also with recalibrated "
            "statistics (pass a score to check)"
        )
    else:
        score_of_batches = measure_score(teacher, score)
        if score_in_eval_mode >= score_of_batches:
            undo()
            return tuple(notes)
        why = (
            f"the score is {score_of_batches:.4g} with them, {score_in_eval_mode:.4g} in eval mode"
        )
    return (f"the model taught with the statistics of each batch: {why}",)


@torch.no_grad()
def _change_of_small_batches(
    teacher: nn.Module, data: Iterable[object], forward: Forward | None
) -> float:
    """Return the change of the outputs if each batch is normalised by itself; 0 of large batches.

    The mode gap joins small batches, but what works may be their own statistics: a generator that
    was trained at batch size 1 has learned to work with the statistics of each image.
    """
    device = device_of(teacher)
    read = read_batches(data, teacher, forward, samples=_MIN_SAMPLES_TO_CHECK, device=device)
    batches = list(read)
    sizes = [batch.size for batch in batches]
    if sizes[0] >= _MIN_SAMPLES_TO_CHECK:
        return 0.0
    layers = [layer for layer in find_layers(teacher) if layer.is_tracking]

    def run() -> list[list[Tensor]]:
        return [list(float_tensors(call(teacher, forward, batch.copied()))) for batch in batches]

    with preserve_random_states(teacher), preserve_statistics(layers):
        running = run()
        undo = _use_batch_statistics(layers)
        try:
            of_batches = run()
        except CalibrationError:  # one value per channel, with which no network is trained
            return 0.0
        finally:
            undo()
    places = places_of_rows(running, sizes) or range(len(running[0]))
    joined = (
        [join_rows([each[place] for each in outputs]) for place in places]
        for outputs in (running, of_batches)
    )
    return relative_change(*joined)


def _use_batch_statistics(layers: Sequence[BatchNormLayer]) -> Callable[[], None]:
    """Let BN layers use the statistics of the batch in either mode; return what undoes it."""

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        # A last batch of one value per channel has no variance.
        if not args or values_per_channel(args[0].shape) > 1:
            module.train()

    def leave(module: nn.Module, args: object, output: object) -> None:
        module.eval()

    handles = [
        handle
        for layer in layers
        for handle in (
            layer.module.register_forward_pre_hook(enter, prepend=True),
            layer.module.register_forward_hook(leave, always_call=True),
        )
    ]

    def undo() -> None:
        for handle in handles:
            handle.remove()

    return undo


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
def _copy_statistics(pairs: Sequence[Pair]) -> None:
    """Give the student's layers that keep running statistics those of their teacher."""
    for pair in pairs:
        for name in ("running_mean", "running_var"):
            own, other = getattr(pair.norm, name, None), getattr(pair.layer, name, None)
            if own is not None and other is not None:
                own.copy_(other)


@contextmanager
def _progress_bar(steps: int, *, is_shown: bool) -> Iterator[Callable[[int, float], None]]:
    """Show a progress bar if there is a terminal, and yield what moves it."""
    if not is_shown:
        yield lambda step, distance: None
        return
    with importing_rich():
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
