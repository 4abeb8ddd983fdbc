"""How far a distillation is, and the file from which one that was interrupted goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnguard.checkpoint import publishing
from bnguard.errors import CheckpointError

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a distillation went.

    Attributes:
        steps: Optimizer steps that were taken, those before an interruption included.
        best_step: The step whose weights were kept; 0 where none was better than the start.
        samples: Samples that the student saw, repetitions counted.
        distance_before: Root mean square difference of the outputs before, in standard deviations
            of the teacher's outputs.
        distance: The same for the weights that were kept.
        resumed_at: The step from which an interrupted one went on; 0 where it began anew.
    """

    steps: int
    best_step: int
    samples: int
    distance_before: float
    distance: float
    resumed_at: int = 0


@dataclass(frozen=True)
class Course:
    """A distillation under way.

    Attributes:
        so_far: What it has come to.
        best_weights: The weights of its best step.
    """

    so_far: Distillation
    best_weights: Weights

    @classmethod
    def begun(cls, distance: float, student: nn.Module) -> Course:
        """Return a course of no steps."""
        start = Distillation(
            steps=0, best_step=0, samples=0, distance_before=distance, distance=distance
        )
        return cls(start, weights_of(student))

    def stepped(self, samples: int) -> Course:
        """Return the course after another step, on so many samples."""
        so_far = self.so_far
        so_far = replace(so_far, steps=so_far.steps + 1, samples=so_far.samples + samples)
        return replace(self, so_far=so_far)

    def measured(self, distance: float, student: nn.Module) -> Course:
        """Return the course with the weights that the student has now, if they are the best."""
        if not distance < self.so_far.distance:
            return self
        best = replace(self.so_far, distance=distance, best_step=self.so_far.steps)
        return Course(best, weights_of(student))


class StateFile:
    """Keeps a course in a file.

    Args:
        path: The file.
        student: The student before its first step: a state of any other is refused.
    """

    def __init__(self, path: str | os.PathLike[str], student: nn.Module) -> None:
        self._path = Path(path)
        self._subject = _digest(student)

    def save(self, course: Course, student: nn.Module, optimizer: Optimizer) -> None:
        """Write what it takes to go on; the file has its old or its new content at any moment.

        Raises:
            CheckpointError: The file cannot be written.
        """
        content = {
            "student": self._subject,
            "so_far": dataclasses.asdict(course.so_far),
            "best_weights": course.best_weights,
            "weights": weights_of(student),
            "optimizer": optimizer.state_dict(),
        }
        path = self._path
        with publishing.write_errors(path), publishing.temporary_beside(path, like=path) as copy:
            publishing.save(content, copy)
            publishing.replace(copy, path)

    def resume(self, student: nn.Module, optimizer: Optimizer) -> Course | None:
        """Put student and optimizer where they were, and return the course; None without a file.

        Raises:
            CheckpointError: The file is unreadable, or of another student.
        """
        if not self._path.exists():
            return None
        content = self._content()
        load_weights(student, content["weights"])
        optimizer.load_state_dict(content["optimizer"])
        so_far = Distillation(**content["so_far"])
        return Course(replace(so_far, resumed_at=so_far.steps), content["best_weights"])

    def remove(self) -> None:
        """Remove the file, since there is nothing left to go on with."""
        self._path.unlink(missing_ok=True)

    def _content(self) -> dict[str, Any]:
        try:
            content = torch.load(self._path, weights_only=True, map_location="cpu")
            subject = content["student"]
        except Exception as error:
            raise CheckpointError(
                f"{self._path}: is no state of a distillation ({type(error).__name__}); "
                "remove it, or name another state_file"
            ) from error
        if subject != self._subject:
            raise CheckpointError(
                f"{self._path}: is the state of another distillation, with other weights or "
                "another norm; remove it, or name another state_file"
            )
        return dict(content)


def weights_of(model: nn.Module) -> Weights:
    """Return a copy of all parameters."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Put the parameters back to what they were."""
    for name, tensor in model.named_parameters():
        tensor.copy_(weights[name])


def _digest(model: nn.Module) -> str:
    """Return what tells a model from others: its modules and the values of its parameters."""
    digest = hashlib.sha256(repr(model).encode())
    for name, tensor in model.named_parameters():
        digest.update(name.encode())
        values = tensor.detach().cpu().contiguous().flatten()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
