"""What holds for every rule: its page, its names, its manners on odd data."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest

from bnguard.errors import ConfigurationError
from bnguard.findings import Finding, Skipped
from bnguard.observe.history import BatchWindow, EvalWindow, LayerHistory, Run, RunningStatistics
from bnguard.rules import RULES, rule_named

SECTIONS = [
    "Why it matters",
    "What you see",
    "Example",
    "Fix",
    "What it does not mean",
    "Evidence",
    "Limits",
    "References",
    "Silence",
]
OPTIONAL = {"Which norm"}
FIGURE = r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e-?\d+)?"

every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)


def test_codes_and_names_are_unique_and_in_order():
    codes = [rule.code for rule in RULES]
    assert codes == sorted(set(codes))
    assert len({rule.name for rule in RULES}) == len(RULES)


@every_rule
def test_the_page_is_complete(rule):
    page = rule.page()
    sections = re.findall(r"^(\w[\w ]*):$", page, flags=re.MULTILINE)
    assert [section for section in sections if section not in OPTIONAL] == SECTIONS
    assert rule.headline().endswith(".")
    assert len(rule.headline()) <= 90
    for limit in dataclasses.fields(rule):
        assert f"    {limit.name}: " in page


@every_rule
def test_code_and_name_have_their_form(rule):
    assert re.fullmatch(r"BN[1-4]\d\d", rule.code)
    assert re.fullmatch(r"[a-z]+(-[a-z]+)*", rule.name)
    assert rule_named(rule.code.lower()) is rule_named(rule.name) is rule


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigurationError, match="did you mean BN301 statistic-drift"):
        rule_named("BN31")


def odd_histories():
    def running(value, updates=3):
        return RunningStatistics(mean=np.full(2, value), var=np.full(2, value), updates=updates)

    def window(value):
        rows = {
            name: np.full(2, value)
            for name in (
                "batches",
                "mean",
                "var_unbiased",
                "var_of_means",
                "var_of_means_successive",
                "var_max",
            )
        }
        return BatchWindow(**rows)

    def evaluated(value, count):
        return EvalWindow(
            count=count,
            batches=1,
            mean=np.full(2, value),
            var_unbiased=np.full(2, value),
            running=running(value),
            step=1,
        )

    yield LayerHistory(name="never called", channels=2, training=True)
    yield LayerHistory(name="", channels=0, training=None)
    yield LayerHistory(name="no counter", channels=2, running=running(1.0, updates=None))
    for value in (0.0, 1.0, -1.0, math.nan, math.inf):
        for count in (0, 1, 10_000):
            yield LayerHistory(
                name=f"all {value}",
                channels=2,
                training=True,
                running=running(value),
                running_at_start=running(value),
                window=window(value),
                momentum=0.0,
                evaluated=evaluated(value, count),
                updates_seen=3,
                is_affine_frozen=True,
                values_per_channel={1: 1, 2: 5},
                run=Run(steps=3, is_settled=count > 1),
            )
    empty = np.empty(0)
    yield LayerHistory(
        name="no channels",
        channels=0,
        training=True,
        running=RunningStatistics(mean=empty, var=empty, updates=1),
        running_at_start=RunningStatistics(mean=empty, var=empty, updates=0),
        is_affine_frozen=True,
        updates_seen=1,
    )


@every_rule
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_odd_data_raise_nothing(rule):
    for layer in odd_histories():
        for result in rule.check(layer):
            assert isinstance(result, Finding | Skipped)
            assert result.code == rule.code


@every_rule
def test_limits_have_their_figures(rule):
    for limit in dataclasses.fields(rule):
        entry = re.search(rf"^ {{4}}{limit.name}: .*(\n {{8}}.*)*", rule.page(), re.MULTILINE)[0]
        figures = {float(figure.replace(",", "")) for figure in re.findall(FIGURE, entry)}
        assert getattr(rule, limit.name) in figures, entry


@every_rule
def test_what_a_rule_explains_exists(rule):
    assert set(rule.explains) <= {other.code for other in RULES} - {rule.code}
