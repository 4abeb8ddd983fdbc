"""BN behind a global pooling, at batches of two: VainF/DeepLabV3Plus-Pytorch#27.

The image-level branch of ASPP has one value per channel and image, so that BN turns two images into
plus and minus one, whatever they show. The report meets it as an error, with batches of one; the
answer there is a larger batch.
"""

from __future__ import annotations

import torch
from torch import nn

from tests.field.situation import Run, Situation, shuffled, train


class Net(nn.Module):
    """Features of the image as a whole, normalised after they are pooled or before."""

    def __init__(self, *, normalises_pooled: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3)
        )
        norm, pool = nn.BatchNorm2d(32), nn.AdaptiveAvgPool2d(1)
        self.branch = nn.Sequential(*((pool, norm) if normalises_pooled else (norm, pool)))
        self.head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(32, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.branch(self.features(images)))


def _train(*, normalises_pooled: bool) -> Run:
    model = Net(normalises_pooled=normalises_pooled)
    return train(model, batches=shuffled(2), lr=0.002, epochs=3)


SITUATION = Situation(
    healthy=lambda: _train(normalises_pooled=False),
    faulty=lambda: _train(normalises_pooled=True),
    cause="BN201",
)
