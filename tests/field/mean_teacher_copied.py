"""A mean teacher whose buffers are copied from the student: LeeDoYup/FixMatch-pytorch#10.

It is called in eval mode alone. Its counters move because they are copied.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits


def _healthy() -> Run:
    student, (images, labels) = conv_net(), digits()
    teacher = copy.deepcopy(student).requires_grad_(False).eval()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(teacher, {"optimizer": optimizer})
    for _ in range(5):
        for batch in torch.randperm(1200).split(32):
            with torch.no_grad():
                target = teacher(images[batch]).softmax(1)
            scores = student(images[batch] + 0.1 * torch.randn_like(images[batch]))
            loss = F.cross_entropy(scores, labels[batch])
            loss = loss + 0.1 * (scores.softmax(1) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for own, new in zip(teacher.parameters(), student.parameters(), strict=True):
                    own.lerp_(new, 0.1)
                for own, new in zip(teacher.buffers(), student.buffers(), strict=True):
                    own.copy_(new)
            watch.monitor.step()
        accuracy = evaluate(watch, images[1200:], labels[1200:])
    return watch.end(accuracy)


SITUATION = Situation(healthy=_healthy)
