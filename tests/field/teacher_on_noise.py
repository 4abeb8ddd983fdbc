"""A teacher that nobody put in eval mode, asked about noise: Piyush-555/GaussianDistillation#2.

Its parameters are frozen and it is called without gradients, and each call moves its statistics:
after distillation the teacher itself is lost. vrvlive/knowlege-distillation#2 forgets ``eval()``
in the same way.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, accuracy, train
from tests.networks import conv_net, digits


def distil(*, is_in_eval_mode: bool, reports: bool = True) -> Run:
    """Distil on noise; the loop reports steps and evaluations, or leaves them to be noticed."""
    images, labels = digits()
    teacher, student = conv_net(), conv_net(4)
    train(teacher, epochs=3)
    teacher.requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    watch = Watch(nn.ModuleDict({"teacher": teacher, "student": student}), {"optimizer": optimizer})
    for _ in range(120):
        student.train()
        teacher.train(not is_in_eval_mode)
        noise = 0.5 + torch.randn(64, 1, 8, 8)
        with torch.no_grad():
            target = teacher(noise).softmax(1)
        optimizer.zero_grad()
        F.cross_entropy(student(noise), target).backward()
        optimizer.step()
        if reports:
            watch.monitor.step()
    teacher.eval()
    with torch.no_grad(), watch.monitor.evaluation() if reports else nullcontext():
        last = accuracy(teacher, images[1200:], labels[1200:])
    return watch.end(last)


SITUATION = Situation(
    healthy=partial(distil, is_in_eval_mode=True),
    faulty=partial(distil, is_in_eval_mode=False),
    cause="BN101",
)
