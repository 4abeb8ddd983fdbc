"""What the ranks found, brought together in one report."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bnguard.distributed import Exchange
from bnguard.findings import Severity
from bnguard.observe.history import History, LayerHistory, Run, RunningStatistics
from bnguard.report import Report
from bnguard.report.all_ranks import _Contribution, merge_findings, merge_reports
from bnguard.rules import RULES
from bnguard.rules.engine import run_rules
from tests.rules.test_engine import HISTORY, fires


def test_the_report_of_the_only_rank_is_its_own():
    """Above all a root stays before a graver consequence."""
    error = fires("A", Severity.ERROR)
    rules = error, fires("B"), fires("C", causes=("A",)), fires("D", Severity.INFO)
    found = run_rules(HISTORY, rules)
    own = Report(HISTORY, found.findings, found.skipped)
    merged = merge_reports(own, Exchange("alone"), rules, lambda finding: True)
    assert [finding.code for finding in own.findings] == ["C", "A", "B", "D"]
    assert merged.findings == own.findings


class Ranks:
    """An exchange of rank zero in which the others bring what is given; None: a rank that left."""

    def __init__(self, *others):
        self.others = others

    def merge(self, mine, merge):
        return merge([mine, *self.others])


def found(code, severity=Severity.WARNING, message="", cause=None):
    (finding,) = run_rules(HISTORY, [fires(code, severity)]).findings
    return dataclasses.replace(finding, message=message, cause=cause)


def running(mean, channels=2):
    return RunningStatistics(mean=np.full(channels, mean), var=np.ones(channels), updates=500)


def brought(*findings, **layers):
    return _Contribution(findings, layers)


def own_report(*findings):
    layer = LayerHistory(name="bn", channels=2, eps=0.0, running=running(0.0))
    return Report(History(layers=(layer,), run=Run(steps=500)), findings, ())


@pytest.mark.parametrize(
    ("holders", "message"),
    [
        ((0, 1, 2), "words of 0"),
        ((1,), "on rank 1: words of 1"),
        ((0, 2), "on ranks 0, 2: words of 0"),
    ],
)
def test_a_finding_is_labelled_with_its_ranks_unless_all_have_it(holders, message):
    by_rank = [
        [found("A", message=f"words of {rank}")] if rank in holders else [] for rank in range(3)
    ]
    assert [finding.message for finding in merge_findings(by_rank)] == [message]


def test_one_rule_at_two_severities_is_two_findings():
    merged = merge_findings([[found("A")], [found("A", Severity.ERROR)]])
    assert [finding.message for finding in merged] == ["on rank 0: ", "on rank 1: "]


def test_a_rank_that_left_brings_nothing():
    merged = merge_reports(
        own_report(found("A")), Ranks(None, brought(found("A"), bn=running(0.0))), (), bool
    )
    assert [finding.message for finding in merged.findings] == ["on ranks 0, 2: "]
    alone = merge_reports(own_report(), Ranks(None, None), RULES, bool)
    assert alone.layers[0].rank_shift_std is None


def test_the_worst_of_all_ranks_comes_first_and_a_root_before_its_consequence():
    consequence = found("B", Severity.ERROR, cause="C")
    other = brought(found("C"), consequence, found("D", Severity.INFO))
    merged = merge_reports(own_report(found("A")), Ranks(other), (), bool)
    assert [finding.code for finding in merged.findings] == ["C", "B", "A", "D"]


def test_the_largest_distance_from_the_own_mean_is_kept_where_shapes_agree():
    far, near = brought(bn=running(-3.0)), brought(bn=running(1.0))
    others = far, near, brought(bn=running(9.0, channels=3)), brought(), None
    (layer,) = merge_reports(own_report(), Ranks(*others), (), bool).layers
    np.testing.assert_allclose(layer.rank_shift_std, [3.0, 3.0])


def test_a_rule_on_the_distance_speaks_only_of_the_ranks_together():
    merged = merge_reports(own_report(), Ranks(brought(bn=running(5.0))), RULES, bool)
    assert "BN2" in repr(merged)
    assert all("on rank" not in finding.message[:7] for finding in merged.findings)
