"""One encoder for two inputs of very different scale: keras-team/keras#11927.

The two values of a pair have ranges hundreds of times apart. In training each call is normalised by
itself; in eval mode both share one mean and one variance.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, shuffled
from tests.networks import digits, mlp


class Twin(nn.Module):
    """Embed both views, and score every pair of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = mlp(32)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        left, right = self.encoder(left), self.encoder(right)
        return F.normalize(left, dim=1) @ F.normalize(right, dim=1).T / 0.1


def _train(*, scales_alike: bool) -> Run:
    images = digits()[0].flatten(1)
    right = images + 0.1 * torch.randn_like(images)
    right = right if scales_alike else 300.0 * right + 200.0
    model = Twin()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(4):
        model.train()
        for batch in shuffled(64)():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images[batch], right[batch]), torch.arange(len(batch)))
            loss.backward()
            optimizer.step()
            watch.monitor.step()
        model.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            parts = torch.arange(1200, 1776).split(64)
            found = torch.stack([model(images[part], right[part]).argmax(1) for part in parts])
    return watch.end((found == torch.arange(64)).float().mean().item())


SITUATION = Situation(
    healthy=partial(_train, scales_alike=True),
    faulty=partial(_train, scales_alike=False),
    cause="BN207",
)
