"""The faults of ``bnguard demo --fault``."""

from __future__ import annotations

import pytest
import torch

from bnguard.cli.main import main
from bnguard.findings import Severity
from bnguard.gallery import FAULTS


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named_first_and_its_repair_gains_accuracy(name):
    fault = FAULTS[name]
    torch.manual_seed(0)
    run = fault.train()
    first = run.report.findings[0]
    assert (first.code, first.severity > Severity.INFO) == (fault.code, True)
    assert fault.accuracy_after(run) - run.accuracy > 0.03


def test_the_command_lists_the_faults_and_tells_what_it_did(capsys):
    assert main(["demo", "--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(FAULTS)
    assert main(["demo", "--fault", "domain-shift"]) == 0
    printed = capsys.readouterr().out.split("\n\n")
    assert "brighter camera" in printed[0]
    assert "BN305 input-shift" in printed[0]
    assert "bnguard.recalibrate(" in printed[1]
    assert "accuracy in eval mode" in printed[1]


def test_an_unknown_fault_is_a_line_with_the_nearest(capsys):
    assert main(["demo", "--fault", "paddding"]) == 2
    line = "bnguard: error: there is no fault 'paddding': did you mean 'padding'?\n"
    assert capsys.readouterr().err == line
