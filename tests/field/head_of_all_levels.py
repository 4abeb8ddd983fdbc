"""One head for all levels of a pyramid, with BN in it: open-mmlab/mmdetection#6515.

Each level is normalised by itself in training; the average fits none. Layers of their own for each
level, as rwightman/efficientdet-pytorch#53 has them, are fine.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from tests.field.situation import Run, Situation, shuffled, train


class Pyramid(nn.Module):
    """Three levels, the deeper the coarser and the larger in value, and scores of all positions."""

    def __init__(self, *, shares: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.down = nn.ModuleList(nn.Conv2d(16, 16, 3, 2, 1) for _ in range(2))
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        one = nn.BatchNorm2d(16)
        self.norms = nn.ModuleList(one if shares else nn.BatchNorm2d(16) for _ in range(3))
        self.scores = nn.Conv2d(16, 10, 1)

    def forward(self, images: Tensor) -> Tensor:
        features, scores = self.norm(self.stem(images)).relu(), []
        for level, norm in enumerate(self.norms):
            scores.append(self.scores(norm(self.conv(features)).relu()).amax((2, 3)))
            if level < 2:
                features = 4.0 * self.down[level](features).relu() + 4.0
        return torch.stack(scores).mean(0)


def _train(*, shares: bool) -> Run:
    return train(Pyramid(shares=shares), batches=shuffled(16), lr=0.02)


SITUATION = Situation(
    healthy=partial(_train, shares=False),
    faulty=partial(_train, shares=True),
    cause="BN207",
)
