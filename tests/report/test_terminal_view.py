"""The report as it is printed."""

from __future__ import annotations

import re

import torch
from rich.console import Console
from torch import nn

import bnguard
from bnguard.findings import LOGARITHM, Evidence, Finding, Fix, Severity, notice, one_line
from bnguard.observe.history import History, Run
from bnguard.report import Report
from bnguard.report.terminal import as_terminal_text, notice_view, report_view
from bnguard.report.views import as_text


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


def test_a_live_line_has_the_colour_of_the_report_and_is_not_wrapped(monkeypatch):
    report = bnguard.inspect(nn.Sequential(nn.BatchNorm1d(4, momentum=0.99)))
    (group, *_) = report.groups
    terminal = Console(force_terminal=True, color_system="standard", width=40)
    monkeypatch.setattr("rich.get_console", lambda: terminal)
    live = as_terminal_text(notice_view(group))
    assert live.startswith("\x1b[1;33mbnguard: warning: BN103")
    assert re.sub(r"\x1b\[[\d;]*m", "", live) == notice(group)


def test_a_repair_is_the_call_for_a_model_and_no_call_for_a_checkpoint():
    model = nn.Sequential(nn.BatchNorm1d(4))
    with torch.no_grad():
        model[0].running_mean.fill_(torch.nan)
    call = "\n         bnguard.recalibrate(model, train_loader)\n"
    assert call in f"{bnguard.inspect(model)}\n"
    assert "bnguard.recalibrate" not in str(bnguard.inspect(model.state_dict()))


def test_a_variance_is_off_by_a_factor_in_print_and_by_its_logarithm_in_json():
    off = ("variance off by", 7.329, 1.5, "ln")
    drift = finding("BN301", "drift", Severity.WARNING, "4", *off)
    report = Report(History(layers=(), run=Run(steps=20)), (drift,), ())
    assert "BN301 drift: variance off by 1,500× (limit 4.5×)\n" in str(report)
    assert "variance off by 1,500× (limit 4.5×). Fix" in one_line(report.groups[0])
    assert report.to_dict()["findings"][0]["evidence"]["value"] == 7.329
    gain = Evidence("gain", 2.0, 1.0, LOGARITHM)
    assert str(gain) == "gain 7.4× (limit 2.7×)"
    # What a measure is called does not decide how its numbers are read.
    assert str(Evidence("|log variance ratio|", 2.0, 1.0)) == "|log variance ratio| 2 (limit 1)"


def finding(code, name, severity, layer, *evidence, cause=None):
    return Finding(
        code=code,
        name=name,
        severity=severity,
        layer=layer,
        message="the mean is far off",
        evidence=Evidence(*evidence),
        fix=Fix("recalibrate"),
        step=9,
        cause=cause,
    )


def test_a_root_cause_is_a_block_with_its_number_its_fix_and_what_it_leads_to():
    findings = (
        finding("BN303", "slow", Severity.WARNING, "1", "initial left", 94.0, 5.0, "%"),
        finding("BN303", "slow", Severity.WARNING, "4", "initial left", 90.0, 5.0, "%"),
        finding("BN301", "drift", Severity.ERROR, "1", "shift", 2.5, 1.0, "σ", cause="BN303"),
        finding("BN302", "gap", Severity.WARNING, None, "change", 0.9, 0.75, "σ", cause="BN301"),
        finding("BN204", "dead", Severity.INFO, "1", "dead channels", 12.5, 75.0, "%"),
    )
    report = Report(History(layers=(), run=Run(steps=20)), findings, ())
    assert str(report).splitlines()[:-2] == [
        "bnguard · 0 BN layers · 20 steps · 1 root cause in 2 layers · 1 info",
        "error  BN303 slow: initial left 94% (limit 5%)",
        "       at 2 layers, worst layer 1, since step 9: the mean is far off",
        "       → recalibrate",
        "       leads to BN301 drift: shift 2.5 σ (limit 1 σ) at layer 1",
        "       leads to BN302 gap: change 0.9 σ (limit 0.75 σ) at the model",
        "info   BN204 dead: dead channels 12.5% (limit 75%)",
        "       at layer 1, since step 9: the mean is far off",
        "       → recalibrate",
    ]


def test_a_checkpoint_comes_with_the_command_that_repairs_it_in_one_line(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(4))
    model[0].running_mean.fill_(torch.nan)
    file = tmp_path / "a checkpoint with a long name.pt"
    torch.save(model.state_dict(), file)
    command = f"  bnguard recalibrate '{file}' --model PACKAGE.CLASS --data PACKAGE.CLASS\n"
    assert command in f"{as_text(bnguard.inspect(file), 60)}\n"
