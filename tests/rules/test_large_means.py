"""A column whose mean lies far from 0: a small rest of the initial mean is a large shift there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bnguard
from bnguard.findings import Severity


def watched(steps, *, evaluated_at, **options):
    """Train on a table whose first column is 10,000 ± 1; return the report and what was told."""
    torch.manual_seed(0)
    table = torch.randn(1000, 4)
    table[:, 0] += 1e4
    labels = (table[:, 1] > 0).long()
    model = nn.Sequential(
        nn.BatchNorm1d(4),
        nn.Linear(4, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    told = []
    with bnguard.watch(model, optimizer=optimizer, on_findings=told.append, **options) as monitor:
        for step in range(1, steps + 1):
            batch = torch.randint(900, (128,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(table[batch]), labels[batch]).backward()
            optimizer.step()
            monitor.step()
            if step in evaluated_at:
                model.eval()
                with torch.no_grad(), monitor.evaluation():
                    model(table[900:])
                model.train()
        return model, monitor.report(), [group.worst for group in told]


def test_while_it_is_forgotten_nothing_else_is_accused():
    _, report, told = watched(110, evaluated_at=(20, 35, 50, 65, 80, 110))
    accused = [finding for finding in (*told, *report.findings) if finding.severity > Severity.INFO]
    assert accused == []


def test_where_training_ends_too_early_it_is_the_cause_and_is_told_ahead():
    model, report, told = watched(60, evaluated_at=(60,), planned_steps=60)
    assert (told[0].code, told[0].step, told[0].channels) == ("BN303", 1, (0,))
    root, *rest = [finding for finding in report.findings if finding.severity > Severity.INFO]
    assert (root.code, root.layer, root.channels) == ("BN303", "0", (0,))
    assert {finding.code for finding in rest} == {"BN301", "BN302"}
    assert all("because of BN303" in finding.message for finding in rest)
    shift = (1e4 - model[0].running_mean[0]) / (model[0].running_var[0] + 1e-5).sqrt()
    assert root.evidence.value == pytest.approx(shift.item(), rel=0.05)
    assert "60 updates, 88 needed" in root.message


def test_of_a_checkpoint_it_is_not_told_since_its_average_may_be_a_plain_one():
    layer = nn.BatchNorm1d(1)
    layer.running_mean.fill_(1e4)
    layer.num_batches_tracked.fill_(60)
    assert bnguard.inspect(layer.state_dict()).findings == ()
