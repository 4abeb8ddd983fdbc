"""Graphs, whose nodes, edges and labels differ in number: PIX2NVS/NVS2Graph#8.

Nodes are no samples: a batch of few graphs has statistics of its own, by sampling alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch
from tests.networks import digits


class GraphNet(nn.Module):
    """Two rounds of messages between nodes, and the mean over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 32), nn.Linear(32, 32)
        self.norms = nn.ModuleList([nn.BatchNorm1d(32), nn.BatchNorm1d(32)])
        self.last = nn.Linear(32, 2)

    def forward(self, nodes, edges, graph):
        for linear, norm in zip((self.first, self.second), self.norms, strict=True):
            received = nodes.new_zeros(nodes.shape).index_add(0, edges[1], nodes[edges[0]])
            nodes = norm(linear(nodes + 0.5 * received)).relu()
        sums = nodes.new_zeros(int(graph.max()) + 1, 32).index_add(0, graph, nodes)
        return self.last(sums / graph.bincount().unsqueeze(1))


def _graphs(images, labels):
    """Yield each image as its bright pixels, joined to the ones to the right and below."""
    for image, label in zip(images[:, 0], labels, strict=True):
        bright = (image > 0.4).nonzero()
        index = {tuple(place.tolist()): number for number, place in enumerate(bright)}
        pairs = [
            (number, index[other])
            for (row, column), number in index.items()
            for other in ((row + 1, column), (row, column + 1))
            if other in index
        ]
        edges = torch.tensor(pairs + [(b, a) for a, b in pairs]).T.reshape(2, -1)
        yield (bright.float() - 3.5) / 3.5, edges, int(label == 1)


def _collated(graphs):
    nodes = torch.cat([graph[0] for graph in graphs])
    sizes = torch.tensor([len(graph[0]) for graph in graphs])
    starts = sizes.cumsum(0) - sizes
    edges = torch.cat([graph[1] + start for graph, start in zip(graphs, starts, strict=True)], 1)
    index = torch.arange(len(graphs)).repeat_interleave(sizes)
    return nodes, edges, index, torch.tensor([graph[2] for graph in graphs])


def _healthy() -> Run:
    images, labels = digits()
    graphs = list(_graphs(images[:800], labels[:800]))
    model = GraphNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(8):
        model.train()
        for batch in torch.randperm(600).split(30):
            *inputs, targets = _collated([graphs[number] for number in batch])
            optimizer.zero_grad()
            F.cross_entropy(model(*inputs), targets).backward()
            optimizer.step()
            watch.monitor.step()
        model.eval()
        right = 0
        with torch.no_grad(), watch.monitor.evaluation():
            for start in range(600, 800, 4):
                *inputs, targets = _collated(graphs[start : start + 4])
                right += (model(*inputs).argmax(1) == targets).sum().item()
    return watch.end(right / 200)


SITUATION = Situation(healthy=_healthy)
