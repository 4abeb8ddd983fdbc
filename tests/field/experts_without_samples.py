"""A gate that soon sends all samples to one expert: davidmrau/mixture-of-experts#22.

The others had a few small batches at the start, and evaluation calls none of them: what is left of
their initial statistics harms nobody.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.field.situation import Run, Situation, Watch, accuracy, shuffled
from tests.networks import digits


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(64, 32), nn.Linear(32, 8), nn.Linear(32, 10)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU()) for _ in range(8)
        )

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.stem(images.flatten(1)))
        weights, chosen = self.gate(hidden).softmax(1).max(1)
        mixed = torch.zeros_like(hidden)
        for number, expert in enumerate(self.experts):
            own = (chosen == number).nonzero()[:, 0]
            if len(own) > self.training:
                mixed = mixed.index_add(0, own, expert(hidden[own]) * weights[own, None])
        return self.head(mixed)


def _healthy() -> Run:
    model, (images, labels) = _Experts(), digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(6):
        model.train()
        for batch in shuffled(16)():
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        model.eval()
        last = accuracy(model, images[1200:], labels[1200:])
    return watch.end(last)


SITUATION = Situation(healthy=_healthy)
