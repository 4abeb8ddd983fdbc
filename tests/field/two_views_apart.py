"""Two views of each image go through SimSiam one after the other, as in PatrickHua/SimSiam#1.

Each view is normalised by its own batch, on purpose: both come from the same augmentation. The
accuracy is that of the nearest neighbour in eval mode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, shuffled
from tests.networks import conv_net, digits


class SimSiam(nn.Module):
    """An encoder with a projector that ends in BN, and a predictor."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*conv_net()[:-1], nn.Linear(128, 32), nn.BatchNorm1d(32))
        self.predictor = nn.Sequential(
            nn.Linear(32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 32)
        )

    def forward(self, one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
        one, two = self.encoder(one), self.encoder(two)
        pairs = ((self.predictor(one), two.detach()), (self.predictor(two), one.detach()))
        return -sum(F.cosine_similarity(own, other).mean() for own, other in pairs) / 2


def _view(images: torch.Tensor) -> torch.Tensor:
    strength = 0.7 + 0.6 * torch.rand(len(images), 1, 1, 1)
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(mirrored, images, images.roll(1, 3))
    return strength * images + 0.1 * torch.randn_like(images)


def _healthy() -> Run:
    model, (images, labels) = SimSiam(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(6):
        model.train()
        for batch in shuffled(64)():
            optimizer.zero_grad()
            model(_view(images[batch]), _view(images[batch])).backward()
            optimizer.step()
            watch.monitor.step()
        model.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            embedded = F.normalize(torch.cat([model.encoder(p) for p in images.split(128)]))
    nearest = labels[(embedded[1200:] @ embedded[:1200].T).argmax(1)]
    return watch.end((nearest == labels[1200:]).float().mean().item())


SITUATION = Situation(healthy=_healthy)
