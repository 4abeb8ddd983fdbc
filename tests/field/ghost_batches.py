"""Ghost batches, each normalised by itself through one layer: dreamquark-ai/tabnet#384.

A layer is called four times a step, with parts of one shuffled batch: neither streams nor
accumulation. In front of it, BN standardises raw columns, a constant one and rare categories too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.field.situation import Run, Situation, Watch, evaluate


class Ghost(nn.Module):
    """BN over parts of at most 64 rows."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, rows: Tensor) -> Tensor:
        return torch.cat([self.norm(part) for part in rows.split(64)])


def _table(rows: int) -> tuple[Tensor, Tensor]:
    """Return amounts, values, a constant, rare categories and a column of zeros; 3 classes."""
    labels = torch.randint(3, (rows,))
    values = torch.randn(rows, 4) + labels[:, None] * torch.tensor([1.6, -1.2, 1.0, 0.0])
    categories = F.one_hot((12 * torch.rand(rows) ** 4).long(), 12)
    constant, zero = torch.full((rows, 1), 3.0), torch.zeros(rows, 1)
    return torch.cat([5e4 * values[:, :1].exp(), values, constant, categories, zero], 1), labels


def _healthy() -> Run:
    (table, labels), (held, expected) = _table(2048), _table(800)
    layers = [nn.Linear(19, 32), Ghost(32), nn.ReLU(), nn.Linear(32, 32), Ghost(32), nn.ReLU()]
    model = nn.Sequential(nn.BatchNorm1d(19), *layers, nn.Linear(32, 3))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(10):
        model.train()
        for batch in torch.randperm(2048).split(256):
            optimizer.zero_grad()
            F.cross_entropy(model(table[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        last = evaluate(watch, held, expected)
    return watch.end(last)


SITUATION = Situation(healthy=_healthy)
