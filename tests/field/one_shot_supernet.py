"""A network of which each step trains another path: liuzechun/MetaPruning#15.

The statistics of a layer mix all paths in front of it, and no single path has them. The searches
estimate them anew for each candidate, mit-han-lab/once-for-all#15.
"""

from __future__ import annotations

import torch
from torch import nn

import bnguard
from tests.field.situation import Run, Situation, Watch, accuracy, evaluate, shuffled
from tests.networks import digits


class Supernet(nn.Module):
    """Two layers, each with four candidates of very different scale, and shared norms."""

    def __init__(self) -> None:
        super().__init__()
        kernels = (1, 3, 5, 7)
        self.first = nn.ModuleList(nn.Conv2d(1, 16, k, padding=k // 2) for k in kernels)
        self.second = nn.ModuleList(nn.Conv2d(16, 32, k, padding=k // 2) for k in kernels)
        self.norms = nn.ModuleList([nn.BatchNorm2d(16), nn.BatchNorm2d(32)])
        self.head = nn.Linear(32, 10)
        self.path = (3, 0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        first, second = self.path
        hidden = self.norms[0](self.first[first](images)).relu()
        return self.head(self.norms[1](self.second[second](hidden)).relu().mean((2, 3)))


def _run(*, draws: bool) -> tuple[Supernet, Run]:
    model = Supernet()
    watch = Watch(model)
    images, labels = digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(14):
        model.train()
        for batch in shuffled(64)():
            if draws:
                model.path = tuple(torch.randint(4, (2,)).tolist())
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        model.path = (3, 0)
        last = evaluate(watch, images[1200:], labels[1200:])
    return model, watch.end(last)


def _recalibrated() -> float:
    model, _ = _run(draws=True)
    images, labels = digits()
    bnguard.recalibrate(model, list(images[:1200].split(64)))
    return accuracy(model.eval(), images[1200:], labels[1200:])


SITUATION = Situation(
    healthy=lambda: _run(draws=False)[1],
    faulty=lambda: _run(draws=True)[1],
    cause="BN301",
    repaired=_recalibrated,
)
