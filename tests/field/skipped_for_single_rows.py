"""BN is skipped for a batch of one, and the service predicts row by row: ludwig-ai/ludwig#2299.

In eval mode a single row needs no batch: the layer would have used its running statistics.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, accuracy, shuffled
from tests.networks import digits, mlp


class _SkippingNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if len(rows) == 1 else self.norm(rows)


def _train(*, skips: bool) -> Run:
    model, (images, labels) = mlp(), digits()
    images = images.flatten(1)
    if skips:
        model[1], model[4] = _SkippingNorm(16), _SkippingNorm(16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(3):
        model.train()
        for batch in shuffled(64)():
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        model.eval()
        last = accuracy(model, images[1200:], labels[1200:], batch=1)
    return watch.end(last)


SITUATION = Situation(
    healthy=partial(_train, skips=False),
    faulty=partial(_train, skips=True),
    cause="BN306",
)
