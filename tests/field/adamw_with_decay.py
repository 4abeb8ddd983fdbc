"""AdamW as most people use it, with decay on all parameters: Samyssmile/edux#209.

That gamma and beta decay is good to know, and no problem: the report ends without any.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import digits


def _healthy() -> Run:
    images, labels = digits()
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.Dropout(0.0),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(4):
        model.train()
        for batch in torch.randperm(1200).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        accuracy = evaluate(watch, images[1200:], labels[1200:])
    return watch.end(accuracy)


SITUATION = Situation(healthy=_healthy)
