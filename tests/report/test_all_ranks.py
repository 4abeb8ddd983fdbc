"""What the ranks found, brought together in one report."""

from __future__ import annotations

from bnguard.distributed import Exchange
from bnguard.findings import Severity
from bnguard.report import Report
from bnguard.report.all_ranks import merge_reports
from bnguard.rules.engine import diagnose
from tests.rules.test_engine import HISTORY, fires


def test_the_report_of_the_only_rank_is_its_own():
    """Above all a root stays before a graver consequence."""
    error = fires("A", Severity.ERROR)
    rules = error, fires("B"), fires("C", causes=("A",)), fires("D", Severity.INFO)
    found = diagnose(HISTORY, rules)
    own = Report(HISTORY, found.findings, found.skipped)
    merged = merge_reports(own, Exchange("alone"), rules, lambda finding: True)
    assert [finding.code for finding in own.findings] == ["C", "A", "B", "D"]
    assert merged.findings == own.findings
