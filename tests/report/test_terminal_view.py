"""The report as it is printed."""

from __future__ import annotations

import torch
from torch import nn

import bnguard
from bnguard.report.terminal import as_text, report_view


def test_the_first_layer_of_the_table_is_the_worst_of_the_finding_with_its_numbers():
    model = nn.Sequential(
        nn.BatchNorm1d(8), nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 16),
        nn.BatchNorm1d(16),
    )  # fmt: skip
    scales = torch.logspace(-2, 0, 8)
    with bnguard.watch(model, select=["BN301"], on_findings=lambda group: None) as monitor:
        for _ in range(200):
            model(torch.randn(32, 8) * scales)
            monitor.step()
        model.eval()
        with monitor.evaluation():
            for _ in range(8):
                model(3.0 + torch.randn(32, 8) * scales * 4.0)
    report = monitor.report()
    (group,) = report.groups
    worst = group.worst
    lines = as_text(report_view(report)).splitlines()
    first = lines[next(i for i, line in enumerate(lines) if line.startswith("layer ")) + 1].split()
    assert first[0] == worst.layer
    assert f"{worst.evidence.value:.3g}" in first[-2:]
