"""A batch of all windows of one recording, as in pytorch/pytorch#4741.

Neighbouring windows share level and gain, which their batch takes out; in eval mode, nothing does.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, accuracy


def _recordings(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return 32 windows of each recording, shape (count, 32, 1, 24), and their five classes."""
    labels = torch.randint(5, (count, 32))
    phase = 2 * math.pi * torch.rand(count, 32, 1)
    waves = torch.sin(phase + 0.5 * (1 + labels[..., None]) * torch.arange(24))
    level, gain = 4.0 * torch.randn(count, 1, 1), torch.randn(count, 1, 1).exp()
    return (gain * (waves + level + 0.3 * torch.randn_like(waves)))[:, :, None], labels


def _train(*, shuffles: bool) -> Run:
    windows, labels = _recordings(60)
    if shuffles:
        order = torch.randperm(60 * 32)
        windows = windows.flatten(0, 1)[order].unflatten(0, (60, 32))
        labels = labels.flatten()[order].view(60, 32)
    held, expected = (part.flatten(0, 1) for part in _recordings(20))
    model = nn.Sequential(
        *(nn.Conv1d(1, 16, 5), nn.BatchNorm1d(16), nn.ReLU()),
        *(nn.Conv1d(16, 32, 5), nn.BatchNorm1d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 5)),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    watch = Watch(model, {"optimizer": optimizer})
    mixed = torch.randperm(len(held))
    for _ in range(6):
        model.train()
        for i in torch.randperm(60):
            optimizer.zero_grad()
            F.cross_entropy(model(windows[i]), labels[i]).backward()
            optimizer.step()
            watch.monitor.step()
        model.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            last = accuracy(model, held[mixed], expected[mixed])
    return watch.end(last)


SITUATION = Situation(
    healthy=partial(_train, shuffles=True),
    faulty=partial(_train, shuffles=False),
    cause="BN203",
)
