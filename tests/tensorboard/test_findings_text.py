"""The findings as text, for viewers without the tab."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnguard.tensorboard.writer import findings_markdown

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
