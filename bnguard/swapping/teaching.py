"""The old network is made fit to teach, and teaches the swapped one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import find_layers
from bnguard.layers.preserve import preserve_modes
from bnguard.recalibration.api import recalibrate
from bnguard.recalibration.batches import Forward
from bnguard.swapping.distillation import Distillation, Progress, Silent, distil
from bnguard.swapping.engine import Engine, OwnDevice

# Statistics further off than this teach nonsense: standard deviations, or a log-variance ratio.
# Healthy networks of the benchmark stay below 0.2.
_MAX_STATISTICS_DISTANCE = 1.5
_SAMPLES_TO_CHECK = 256
_MIN_SAMPLES_TO_CHECK = 32


@dataclass(frozen=True, kw_only=True)
class Teaching:
    """How a swapped network is to learn.

    Attributes:
        data: Batches, which can be read more than once.
        steps: Optimizer steps at most.
        forward: ``forward(model, batch)`` calls a model; None where the batch says how.
        engine: Where it computes.
        progress: Whether to show a progress bar.
    """

    data: Iterable[object]
    steps: int
    forward: Forward | None
    engine: Engine
    progress: bool

    def teach(
        self,
        student: nn.Module,
        teacher: nn.Module,
        pairs: Sequence[tuple[nn.Module, nn.Module]],
    ) -> tuple[Distillation, tuple[str, ...]]:
        """Return how it went, and what a reader should know besides.

        Args:
            student: The swapped network; its weights change.
            teacher: A copy of the old one, whose statistics may be recalibrated.
            pairs: Layers of the student and the teacher whose outputs are to agree.
        """
        with _moved(student, self.engine):
            self.engine.to_device(teacher)
            notes = self._mended(teacher)
            if notes:
                _hand_on_statistics(pairs)
            distillation = distil(
                student,
                teacher,
                self.data,
                pairs=pairs,
                steps=self.steps,
                forward=self.forward,
                engine=self.engine,
                progress=self._bar(),
            )
        return distillation, notes

    def _mended(self, teacher: nn.Module) -> tuple[str, ...]:
        """Recalibrate a teacher whose statistics do not fit the data, and say so."""
        if not any(layer.is_tracking for layer in find_layers(teacher)):
            return ()
        with preserve_modes(teacher):
            teacher.eval()
            try:
                found = recalibrate(
                    teacher,
                    self.data,
                    samples=_SAMPLES_TO_CHECK,
                    forward=self.forward,
                    progress=False,
                )
            except CalibrationError as error:
                return (f"the running statistics could not be checked before they taught: {error}",)
        worst = max(found.layers, key=lambda layer: layer.distance)
        if worst.distance <= _MAX_STATISTICS_DISTANCE or found.samples < _MIN_SAMPLES_TO_CHECK:
            found.undo()
            return ()
        return (
            f"the running statistics did not fit teacher_data (the worst: {worst.name}), so they "
            "were recalibrated before the model taught",
        )

    def _bar(self) -> Progress:
        if not (self.progress and self.engine.is_global_zero):
            return Silent()
        from bnguard.swapping.view import DistillationBar

        return DistillationBar(self.steps)


@contextmanager
def _moved(model: nn.Module, engine: Engine) -> Iterator[None]:
    """Hold a model where the engine computes; put it back at the end."""
    home = OwnDevice(model).device
    engine.to_device(model)
    try:
        yield
    finally:
        if OwnDevice(model).device != home:
            model.to(home)


@torch.no_grad()
def _hand_on_statistics(pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Give the student's layers that keep running statistics those of their teacher."""
    for layer, taught_by in pairs:
        for name in ("running_mean", "running_var"):
            own, other = getattr(layer, name, None), getattr(taught_by, name, None)
            if own is not None and other is not None:
                own.copy_(other)
