"""What viewers without the tab are given."""

import html
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnguard.tensorboard.metadata import Metric, standard_metrics
from bnguard.tensorboard.writer import findings_markdown, lean_scalars


def metric(**fields):
    return Metric(name="", unit="", description="", panel="", **fields)


def test_four_scalars_a_metric_whatever_the_number_of_layers():
    metrics = standard_metrics()
    scalars = lean_scalars(metrics, np.ones((len(metrics), 200)))
    assert len(scalars) == 4 * sum(metric.has_quantiles for metric in metrics) == 32


def test_quantiles_over_the_layers_leave_out_what_is_not_finite():
    values = [[*range(101), np.nan, np.inf]]
    scalars = lean_scalars([metric(key="gain")], values)
    assert scalars == {
        "bnguard/gain/p05": 5.0,
        "bnguard/gain/p50": 50.0,
        "bnguard/gain/p95": 95.0,
        "bnguard/gain/max": 100.0,
    }


def test_the_worst_layer_is_on_the_side_of_the_fault():
    values = [[1.0, 9.0], [-3.0, 2.0]]
    sides = [metric(key="n", limit_side="below"), metric(key="r", limit_side="either")]
    scalars = lean_scalars(sides, values)
    assert scalars["bnguard/n/min"] == 1.0
    assert scalars["bnguard/r/max"] == 3.0
    assert "bnguard/n/max" not in scalars


def test_a_metric_that_nobody_observed_has_no_scalars():
    assert lean_scalars([metric(key="n")], [[np.nan, np.nan]]) == {}


FINDING = {
    "code": "BN301",
    "name": "statistic-drift",
    "severity": "warning",
    "layer": "layer1|bn",
    "step": 40,
    "message": "off",
    "evidence": {"measure": "shift", "value": 2.25, "limit": 1.0, "unit": "σ"},
    "fix": {"summary": "recalibrate", "repair": "recalibrate"},
}


def test_findings_are_a_markdown_table():
    head, _, row = findings_markdown([FINDING]).splitlines()
    assert head.count("|") == 7
    assert "shift 2.25 σ (limit 1 σ)" in row
    assert r"layer1\|bn" in row


@given(st.text(max_size=60))
def test_names_cannot_break_out_of_the_table(name):
    lines = findings_markdown([{**FINDING, "layer": name}]).splitlines()
    assert len(lines) == 3
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", lines[2])) == 7


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "[a](javascript:x)", "`x`", "*x*"])
def test_names_are_no_markup(name):
    row = findings_markdown([{**FINDING, "layer": name}]).splitlines()[2]
    assert name not in row
    assert name in html.unescape(re.sub(r"\\(.)", r"\1", row))
