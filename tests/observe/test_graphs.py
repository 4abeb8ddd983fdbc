"""Graph networks: nodes are not samples, and what cannot be judged is said in plain words."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnguard

NODES = 20


class GraphNet(nn.Module):
    """One round of messages between nodes."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, nodes, links):
        if links.layout is torch.strided and len(links) == 2:
            nodes = nodes + torch.zeros_like(nodes).index_add(0, links[1], nodes[links[0]])
        else:
            nodes = nodes + links @ nodes
        return self.last(self.norm(self.first(nodes)).relu())


def batch_of_graphs(links, graphs):
    """Independent graphs, whose nodes have an offset in common."""
    nodes = torch.randn(graphs, 1, 4) + 0.3 * torch.randn(graphs, NODES, 4)
    adjacency = torch.block_diag(*(torch.rand(graphs, NODES, NODES) < 0.2).float())
    return nodes.flatten(0, 1), {
        "edges": lambda: adjacency.nonzero().T,
        "dense": lambda: adjacency,
        "coo": adjacency.to_sparse,
        "csr": adjacency.to_sparse_csr,
    }[links]()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("graphs", [1, 4], ids=["1 graph", "4 graphs"])
@pytest.mark.parametrize("links", ["edges", "dense", "coo", "csr"])
def test_nodes_are_not_judged_as_samples(links, graphs):
    model = GraphNet()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with bnguard.watch(
        model, optimizer=optimizer, on_findings=lambda group: None, strict=True
    ) as monitor:
        for _ in range(60):
            optimizer.zero_grad()
            model(*batch_of_graphs(links, graphs)).square().mean().backward()
            optimizer.step()
            monitor.step()
        model.eval()
        with torch.no_grad(), monitor.evaluation():
            for _ in range(3):
                model(*batch_of_graphs(links, graphs))
        report = monitor.report()
    assert not {"BN203", "BN302"} & {finding.code for finding in report.findings}
    reasons = {skipped.code: skipped.reason for skipped in report.skipped}
    assert "are not independent samples (graphs" in reasons["BN302"]
    assert "row of numbers per sample (as with graphs)" in reasons["BN203"]
    shown = str(report) + " ".join(report.notes)
    assert "Error" not in shown
    assert " 0 samples" not in shown

    batches = [batch_of_graphs(links, graphs) for _ in range(4)]
    for work in (bnguard.recalibrate, bnguard.diagnose):
        if links == "csr" and work is bnguard.diagnose:
            continue  # it copies batches by deepcopy, which torch does not have for this layout
        shown = str(work(model, batches, progress=False, forward=lambda m, b: m(*b)))
        assert "mat1" not in shown
        assert "Error" not in shown
        assert " 0 samples" not in shown


def test_compressed_sparse_inputs_are_diagnosed():
    model = GraphNet()
    batches = [batch_of_graphs("csr", 1) for _ in range(2)]
    diagnosis = bnguard.diagnose(model, batches, forward=lambda model, batch: model(*batch))
    assert diagnosis.cause.name == "unconverged-statistics"
