"""Student and teacher in one module, as YU1ut/MixMatch-pytorch#16 has them.

The buffers of the teacher are copied from the student, and it is evaluated at the end alone.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits


class Pair(nn.Module):
    """The student in train mode, the teacher in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.student = conv_net()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, images):
        return self.student(images) if self.training else self.teacher(images)


def _healthy() -> Run:
    model, (images, labels) = Pair(), digits()
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(5):
        model.train()
        for batch in torch.randperm(1200).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            with torch.no_grad():
                own, new = model.teacher, model.student
                for old, value in zip(own.parameters(), new.parameters(), strict=True):
                    old.lerp_(value, 0.1)
                for old, value in zip(own.buffers(), new.buffers(), strict=True):
                    old.copy_(value)
            watch.monitor.step()
    return watch.end(evaluate(watch, images[1200:], labels[1200:]))


SITUATION = Situation(healthy=_healthy)
