"""A finding is told as the consequence of another only where that can have made it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from bnguard.findings import Evidence, Finding, Fix, Severity, group_findings
from bnguard.observe.history import EvalWindow, History, LayerHistory, Run, RunningStatistics
from bnguard.rules import RULES
from bnguard.rules.engine import Explanations


def found(code, layer, step=None):
    return Finding(
        code=code,
        name=code,
        severity=Severity.WARNING,
        layer=layer,
        message="",
        evidence=Evidence("x", 1, 0),
        fix=Fix(""),
        step=step,
    )


def layer(name, position, shift=2.0):
    seen = EvalWindow(
        count=64,
        batches=1,
        mean=np.array([shift]),
        var_unbiased=np.ones(1),
        running=RunningStatistics(mean=np.zeros(1), var=np.ones(1), updates=100),
        step=100,
    )
    return LayerHistory(name=name, channels=1, position=position, evaluated=seen)


# Registered in another order than that of the calls; the second fits.
HISTORY = History(
    layers=(layer("late", 2), layer("early", 0), layer("fits", 1, shift=0.1)), run=Run(steps=100)
)


def cause(symptom, *causes):
    chain = Explanations(HISTORY, RULES, (*causes, symptom)).chain(symptom)
    return None if len(chain) == 1 else (chain[-2].code, chain[-2].layer)


@pytest.mark.parametrize(
    ("symptom", "source", "is_plausible"),
    [
        (found("BN301", "late", 100), found("BN305", "early", 100), True),
        (found("BN301", "early", 100), found("BN208", "late", 50), False),  # lies before it
        (found("BN301", "late", 100), found("BN208", "early", 50), True),
        (found("BN301", "late", 100), found("BN208", "early", 101), False),  # came before it
        (found("BN302", None), found("BN402", "late", 50), False),  # was put back
        (found("BN302", None), found("BN208", "late", 120), False),
        (found("BN301", "late", 100), found("BN103", "fits"), False),
        (found("BN301", "late", 100), found("BN202", "fits"), True),  # each batch is off
        (found("BN402", "early", 50), found("BN401", "late", 50), False),
        (found("BN402", "early", 51), found("BN401", "late", 50), True),  # by the weights
        (found("BN303", "late"), found("BN103", "early"), False),  # has a counter of its own
        (found("BN303", "fits"), found("BN103", "fits"), True),
        (found("BN301", "late", 100), found("BN101", "late"), False),  # an optimizer moves none
    ],
)
def test_a_cause_lies_at_or_before_what_it_explains_and_has_done_harm(
    symptom, source, is_plausible
):
    assert cause(symptom, source) == ((source.code, source.layer) if is_plausible else None)


def test_the_cause_at_the_layer_itself_goes_before_a_worse_one():
    worse = dataclasses.replace(found("BN103", "early"), evidence=Evidence("x", 9, 1))
    assert cause(found("BN301", "late"), worse, found("BN103", "late")) == ("BN103", "late")


def test_what_is_explained_and_what_is_not_stand_apart_in_a_report():
    explained = dataclasses.replace(found("BN301", "late"), cause="BN305")
    otherwise = dataclasses.replace(found("BN301", "fits"), cause="BN303")
    groups = group_findings([explained, found("BN301", "early"), otherwise])
    assert [(len(group.findings), group.causes) for group in groups] == [
        (2, ("BN305", "BN303")),
        (1, ()),
    ]


@pytest.mark.parametrize("code", ["BN201", "BN204"])
def test_what_weights_that_are_nan_make_of_a_layer_is_a_consequence(code):
    history = History(layers=(layer("early", 0), layer("late", 1)), run=Run(steps=200))
    findings = [found("BN402", "early", 50), found(code, "late", 200)]
    chain = Explanations(history, RULES, findings).chain(findings[1])
    assert [finding.code for finding in chain] == ["BN402", code]
