"""How far a distillation is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """How a distillation went.

    Attributes:
        steps: Optimizer steps that were taken.
        best_step: The step whose weights were kept; 0 where none was better than the start.
        samples: Samples that the student saw, repetitions counted.
        distance_before: Root mean square difference of the outputs before, in standard deviations
            of the teacher's outputs.
        distance: The same for the weights that were kept.
    """

    steps: int
    best_step: int
    samples: int
    distance_before: float
    distance: float


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


def weights_of(model: nn.Module) -> Weights:
    """Return a copy of all parameters."""
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters()}


@torch.no_grad()
def load_weights(model: nn.Module, weights: Weights) -> None:
    """Put the parameters back to what they were."""
    for name, tensor in model.named_parameters():
        tensor.copy_(weights[name])
