"""Distillation: a frozen teacher with inputs of its own comes first: Deci-AI/super-gradients#183.

The teacher has other normalisation constants than the student, and its first BN layer is the first
of the model. In validation the images of the student are not scaled.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.field.situation import Run, Situation, Watch
from tests.networks import conv_net, digits


class _Distillation(nn.Module):
    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student

    def forward(self, images: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            labels = self.teacher(own).softmax(1)
        return self.student(images), labels


def _teacher() -> nn.Sequential:
    model, (images, labels) = conv_net(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(2.0 * images[batch] - 1.0), labels[batch]).backward()
            optimizer.step()
    return model


def _train(*, is_scaled_in_validation: bool) -> Run:
    images, labels = digits()
    model = _Distillation(_teacher(), conv_net())
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    own = 2.0 * images - 1.0
    for _ in range(3):
        model.train()
        model.teacher.eval()
        for batch in torch.randperm(1200).split(64):
            scores, soft = model(images[batch], own[batch])
            loss = F.kl_div(scores.log_softmax(1), soft, reduction="batchmean")
            optimizer.zero_grad()
            (loss + F.cross_entropy(scores, labels[batch])).backward()
            optimizer.step()
            watch.monitor.step()
        model.eval()
        scale = 1.0 if is_scaled_in_validation else 16.0
        with torch.no_grad(), watch.monitor.evaluation():
            parts = zip(images[1200:].split(64), own[1200:].split(64), strict=True)
            scores = torch.cat([model(scale * part, whole)[0] for part, whole in parts])
    return watch.end((scores.argmax(1) == labels[1200:]).float().mean().item())


SITUATION = Situation(
    healthy=partial(_train, is_scaled_in_validation=True),
    faulty=partial(_train, is_scaled_in_validation=False),
    cause="BN305",
)
