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


def test_findings_are_a_list_with_the_cause_before_what_it_explains():
    cause = {**FINDING, "code": "BN303", "name": "unconverged-statistics"}
    text = findings_markdown([{**FINDING, "cause": "BN303"}, cause])
    assert text.splitlines() == [
        "- **warning: off**",
        r"    - BN303 unconverged-statistics at layer1\|bn, since step 40",
        "    - shift 2.25 σ (limit 1 σ)",
        "    - leads to BN301",
        "    - → recalibrate",
        "    - → bnguard recalibrate CKPT --model PACKAGE.CLASS --data PACKAGE.CLASS",
    ]


def test_a_variance_ratio_is_a_factor():
    evidence = {"measure": "variance off by", "value": 7.329, "limit": 1.5, "unit": "ln"}
    text = findings_markdown([{**FINDING, "layer": "4", "evidence": evidence}])
    assert "BN301 statistic-drift at layer 4, since step 40" in text
    assert "variance off by 1,500× (limit 4.5×)" in text


@given(st.text(max_size=60))
def test_names_cannot_break_out_of_the_list(name):
    assert len(findings_markdown([{**FINDING, "layer": name}]).splitlines()) == 5


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "[a](javascript:x)", "`x`", "*x*"])
def test_names_are_no_markup(name):
    row = findings_markdown([{**FINDING, "layer": name}]).splitlines()[1]
    assert name not in row
    assert name in html.unescape(re.sub(r"\\(.)", r"\1", row))
