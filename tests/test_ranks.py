"""What the ranks found, brought together in one report."""

from __future__ import annotations

from bnguard.diagnosis import diagnose
from bnguard.exchange import Exchange
from bnguard.findings import Severity
from bnguard.ranks import merge_reports
from bnguard.report import Report
from tests.test_diagnosis import HISTORY, fires


def test_the_report_of_the_only_rank_is_its_own():
    """Above all a root stays before a graver consequence."""
    error = fires("A", Severity.ERROR)
    rules = error, fires("B"), fires("C", causes=("A",)), fires("D", Severity.INFO)
    found = diagnose(HISTORY, rules)
    own = Report(HISTORY, found.findings, found.skipped)
    merged = merge_reports(own, Exchange("alone"), rules, lambda finding: True)
    assert [finding.code for finding in own.findings] == ["C", "A", "B", "D"]
    assert merged.findings == own.findings
