"""What a watched training writes, read back from its event file."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import bnguard
from bnguard.findings import Severity
from bnguard.loggers import RunLog, TensorBoard
from bnguard.rules import RULES
from bnguard.tensorboard.log_report import logged_runs, open_log
from bnguard.tensorboard.measures import MEASURES, compute_metrics
from bnguard.tensorboard.metadata import CHANNEL_ROWS, LogError, standard_metrics
from tests.networks import conv_net, train


def test_every_metric_has_a_measure():
    assert {metric.key for metric in standard_metrics()} == set(MEASURES)


def test_what_was_observed_is_what_is_read(tmp_path):
    model = conv_net(momentum=0.01)
    with (
        SummaryWriter(tmp_path) as writer,
        bnguard.watch(model, on_findings=lambda group: None) as monitor,
    ):
        log = TensorBoard(writer)
        train(model, monitor)
        report = monitor.report()
        log.log_layers(report, 57)
        log.log_layers(report, 57)
        log.log_report(report, 57)

    metrics = standard_metrics()
    values = compute_metrics(report.layers, metrics)
    by_key = dict(zip([metric.key for metric in metrics], values, strict=True))
    assert by_key["values_per_channel"].tolist() == [4096, 1024, 256]
    assert np.isfinite(by_key["eval_shift_std"]).all()
    assert np.nanmax(by_key["dead_channel_share"]) < 1

    (run,) = logged_runs(tmp_path)
    assert run.layers == ("1", "4", "7")
    assert (run.first_step, run.last_step, run.problem) == (57, 57, "")
    assert {finding.code for finding in run.findings} >= {"BN303"}
    # The evaluation was shown once, whatever was logged after it.
    assert open_log(tmp_path).channels(".", "1").steps.tolist() == [57]


def test_channels_are_as_dead_as_the_rule_finds_them(tmp_path):
    model = nn.BatchNorm1d(4)
    with SummaryWriter(tmp_path) as writer, bnguard.watch(model) as monitor:
        log = TensorBoard(writer)
        # The variance of the second is between a tenth of eps and eps.
        batch = torch.randn(64, 4) * torch.tensor([1.0, 2e-3, 1e-4, 0.0])
        model(batch)
        monitor.step()
        report = monitor.report()
        log.log_report(report, 1)
    (finding,) = [found for found in report.findings if found.code == "BN204"]
    assert finding.channels == (2, 3)
    (metric,) = [metric for metric in standard_metrics() if metric.key == "dead_channel_share"]
    assert compute_metrics(report.layers, [metric]).item() == 0.5
    series = open_log(tmp_path).channels(".", "")
    assert series.values[-1, CHANNEL_ROWS.index("is_dead")].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_sorted_data_are_beyond_the_limit_at_the_first_layer():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    with bnguard.watch(model, on_findings=lambda group: None) as monitor:
        for step in range(16):
            model(torch.randn(32, 4) + 3 * (step % 2))
            monitor.step()
        report = monitor.report()
    (finding,) = [found for found in report.findings if found.code == "BN203"]
    (metric,) = [metric for metric in standard_metrics() if metric.key == "data_order"]
    first, second = compute_metrics(report.layers, [metric])[0]
    assert (first, metric.limit) == (pytest.approx(finding.evidence.excess), 1.0)
    assert np.isnan(second)


def test_what_is_over_is_logged_with_its_steps(tmp_path):
    layer = nn.BatchNorm1d(4, momentum=0.0)
    with (
        SummaryWriter(tmp_path) as writer,
        bnguard.watch(layer, every_n_steps=10, on_findings=lambda group: None) as monitor,
    ):
        for step in range(40):
            layer.momentum = 0.0 if step < 20 else 0.1
            layer(torch.randn(16, 4))
            monitor.step()
        TensorBoard(writer).log_layers(monitor.report(), 40)
    (run,) = logged_runs(tmp_path)
    (past,) = [finding for finding in run.findings if finding.code == "BN103"]
    assert past.severity is Severity.INFO
    assert past.message.startswith("error at steps 1–20, gone since: ")
    assert str(past.evidence) == "last step with it 20"


def test_a_model_without_bn_writes_nothing(tmp_path):
    with pytest.warns(UserWarning, match="no BN layers"):
        monitor = bnguard.watch(nn.Linear(2, 2))
    with SummaryWriter(tmp_path) as writer:
        RunLog([TensorBoard(writer)], RULES).conclude(monitor.report(), 1)
    with pytest.raises(LogError):
        logged_runs(tmp_path)
