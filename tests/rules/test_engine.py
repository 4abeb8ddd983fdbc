"""The order of findings: root causes first, and one cause as one entry."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import bnguard
from bnguard.findings import Evidence, Finding, Fix, Severity
from bnguard.observe.history import History, LayerHistory, Run
from bnguard.rules import ModelRule, Rule
from bnguard.rules.engine import run_rules
from tests.benchmarks.networks import resnet50


def fires(rule_code, severity=Severity.WARNING, causes=()):
    class Fires(Rule):
        code = rule_code
        name = rule_code.lower()
        explains = causes

        def check(self, layer):
            yield Finding(
                code=self.code,
                name=self.name,
                severity=severity,
                layer=layer.name,
                message="",
                evidence=Evidence("x", 1, 0),
                fix=Fix(""),
            )

    return Fires()


HISTORY = History(layers=(LayerHistory(name="0", channels=1),), run=Run())


def order(*rules):
    return [(f.code, f.cause) for f in run_rules(HISTORY, rules).findings]


def test_a_cause_stands_before_what_it_explains_and_is_named_there():
    assert order(fires("B"), fires("C", causes=("B",))) == [("C", None), ("B", "C")]


def test_a_chain_of_causes_begins_with_the_root():
    assert order(fires("A"), fires("B", causes=("A",)), fires("C", causes=("B",))) == [
        ("C", None),
        ("B", "C"),
        ("A", "B"),
    ]


def test_a_root_is_as_urgent_as_the_worst_that_it_explains():
    rules = fires("A"), fires("C", Severity.ERROR), fires("D", causes=("C",))
    assert [code for code, _ in order(*rules)] == ["D", "C", "A"]


def test_rules_that_explain_each_other_end_somewhere():
    assert len(order(fires("A", causes=("B",)), fires("B", causes=("A",)))) == 2


def test_info_explains_nothing_and_stands_last():
    rules = fires("A", Severity.INFO, causes=("B",)), fires("B")
    assert order(*rules) == [("B", None), ("A", None)]


def test_what_is_not_wanted_is_left_out():
    found = run_rules(HISTORY, [fires("A"), fires("B")], lambda finding: finding.code == "B")
    assert [finding.code for finding in found.findings] == ["B"]


class RaisesAtOnce(Rule):
    code = "X1"
    name = "raises-at-once"

    def check(self, layer):
        raise ZeroDivisionError("of their own")


class RaisesForTheModel(ModelRule):
    code = "X2"
    name = "raises-for-the-model"

    def check_model(self, history):
        raise ZeroDivisionError("of their own")


@pytest.mark.parametrize(("rule", "layer"), [(RaisesAtOnce(), "0"), (RaisesForTheModel(), None)])
def test_a_rule_that_raises_is_skipped(rule, layer):
    (skipped,) = run_rules(HISTORY, [rule]).skipped
    assert (skipped.code, skipped.layer) == (rule.code, layer)
    assert "ZeroDivisionError: of their own" in skipped.reason


def test_a_large_network_with_every_layer_affected_fits_on_a_screen():
    torch.manual_seed(0)
    model = resnet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.001
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=1e-4)
    with bnguard.watch(
        model,
        optimizer=optimizer,
        loader=DataLoader(torch.zeros(9, 3, 32, 32), 4),
        accumulated_batches=4,
        on_findings=lambda group: None,
    ) as monitor:
        for _ in range(10):
            model(torch.randn(4, 3, 32, 32)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            monitor.step()
        model.eval()
        with torch.no_grad(), monitor.evaluation():
            model(5 * torch.randn(16, 3, 32, 32) + 3)
    report = monitor.report()
    causes = {finding.code: finding.cause for finding in report.findings}
    assert len(report.findings) >= 200
    assert len(report.groups) >= 9
    # The values that end in infinity are those that the statistics left untamed.
    chain = [causes[code] for code in ("BN401", "BN403", "BN301", "BN303")]
    assert chain == ["BN403", "BN301", "BN303", None]
    places = list(causes)
    assert places.index("BN303") < min(places.index(code) for code in ("BN301", "BN302", "BN401"))
    lines = str(report).splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


def test_a_rule_of_ones_own_that_raises_is_told_once_and_stops_no_training():
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.BatchNorm1d(8))
    rules = [*bnguard.RULES, RaisesAtOnce()]
    with bnguard.watch(model, rules=rules, every_n_steps=1) as monitor:
        for _ in range(30):
            model(torch.randn(16, 4))
            monitor.step()
    text = str(monitor.report())
    assert text.count("X1: the rule failed with ZeroDivisionError") == 1


def test_what_is_no_finding_is_a_failure_of_its_rule():
    class YieldsWords(Rule):
        code = "X3"
        name = "yields-words"

        def check(self, layer):
            yield "something is wrong"

    (skipped,) = run_rules(HISTORY, [YieldsWords()]).skipped
    assert skipped.is_failure
    assert "yields Finding or Skipped, not str" in skipped.reason
