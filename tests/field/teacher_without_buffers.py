"""A mean teacher of which the parameters alone are averaged, as in CuriousAI/mean-teacher#9.

Student and teacher start from pretrained weights. The teacher labels the batches in eval mode, with
the statistics of the pretraining: ``zip(teacher.parameters(), student.parameters())`` does not
reach the buffers. pytorch/ignite#2590 has the figures of such an average.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch
from tests.networks import conv_net, digits


def pretrained() -> nn.Sequential:
    """Return a network that learnt the digits of another scanner: mirrored, and bright."""
    model, (images, labels) = conv_net(), digits()
    images = 1.0 - 0.3 * images.flip(-1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(2):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def _train(*, copies_buffers: bool, is_part: bool = False) -> Run:
    images, labels = digits()
    student = pretrained()
    teacher = copy.deepcopy(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    watched = nn.ModuleDict({"student": student, "teacher": teacher}) if is_part else teacher
    watch = Watch(watched, {"optimizer": optimizer})
    for _ in range(6):
        student.train()
        teacher.eval()
        for batch in torch.randperm(1200).split(64):
            with torch.no_grad():
                target = teacher(images[batch]).softmax(1)
            scores = student(images[batch] + 0.1 * torch.randn(len(batch), 1, 8, 8))
            loss = F.cross_entropy(scores, labels[batch])
            (loss + 0.1 * F.mse_loss(scores.softmax(1), target)).backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for own, new in zip(teacher.parameters(), student.parameters(), strict=True):
                    own.lerp_(new, 0.05)
                if copies_buffers:
                    for own, new in zip(teacher.buffers(), student.buffers(), strict=True):
                        own.copy_(new)
            watch.monitor.step()
        student.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            if is_part:
                student(images[1200:])
            scores = torch.cat([teacher(part) for part in images[1200:].split(64)])
    return watch.end((scores.argmax(1) == labels[1200:]).float().mean().item())


def situation(*, is_part: bool) -> Situation:
    """Return the situation with the teacher watched alone, or as a part of what trains."""
    train = partial(_train, is_part=is_part)
    return Situation(
        healthy=partial(train, copies_buffers=True),
        faulty=partial(train, copies_buffers=False),
        cause="BN304",
    )


SITUATION = situation(is_part=False)
