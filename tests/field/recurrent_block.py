"""One block that is called again and again, with one BN layer: pytorch/pytorch#1738.

Each iteration adds to the state, and has a distribution of its own; ``eval()`` is much worse than
``train()``. A layer for each iteration is the way out.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tests.field.situation import Run, Situation, train


class Recurrent(nn.Module):
    """Refine a state four times."""

    def __init__(self, *, shares_norm: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.block = nn.Conv2d(16, 16, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(1 if shares_norm else 4))
        self.head = nn.Linear(16 * 16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        state = self.stem(images)
        for i in range(4):
            update = self.norms[i % len(self.norms)](self.block(state)).relu()
            state = 2.0 * state + update
        return self.head(nn.functional.avg_pool2d(state, 2).flatten(1))


def _train(*, shares_norm: bool) -> Run:
    return train(Recurrent(shares_norm=shares_norm), lr=0.005)


SITUATION = Situation(
    healthy=partial(_train, shares_norm=False),
    faulty=partial(_train, shares_norm=True),
    cause="BN207",
)
