"""Every healthy run and one fault a rule, from one seed; ``python -m tests.zoo`` runs the whole."""

from __future__ import annotations

import pytest

from bnguard.rules import RULES
from tests.zoo.faults import FAULTS
from tests.zoo.healthy import HEALTHY
from tests.zoo.runs import FaultyRun, HealthyRun, run_fault
from tests.zoo.scoreboard import scoreboard

# Two processes each, which have to import everything anew.
SLOW = ("BN106", "BN210")
ONE_A_RULE = {fault.code: fault for fault in reversed(FAULTS)}.values()
TWINS = [
    (fault, architecture)
    for fault in FAULTS
    for architecture in fault.architectures
    if fault.code not in SLOW
    and (fault not in ONE_A_RULE or architecture != fault.architectures[0])
]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(
            fault,
            id=f"{fault.code} {fault.name}",
            marks=[pytest.mark.slow] if fault.code in SLOW else [],
        )
        for fault in ONE_A_RULE
    ],
)
def test_a_fault_is_named_and_its_twin_is_not_accused(fault):
    run = run_fault(fault, fault.architectures[0], seed=5)
    assert run.is_named
    assert run.is_early or not fault.shows_early
    assert run.is_cause_first or not fault.is_cause
    assert run.twin.accusations == ()


@pytest.mark.parametrize(
    ("fault", "architecture"), TWINS, ids=lambda part: getattr(part, "name", part)
)
def test_a_twin_is_accused_of_nothing(fault, architecture):
    twin = fault.watched(is_faulty=False, architecture=architecture, seed=5)
    assert twin.accusations == ()


@pytest.mark.parametrize("healthy", HEALTHY, ids=lambda healthy: healthy.name)
def test_a_healthy_run_is_accused_of_nothing(healthy):
    assert healthy.watched(seed=5).accusations == ()


def test_every_rule_has_a_fault():
    assert {fault.code for fault in FAULTS} == {rule.code for rule in RULES}


def test_every_run_has_a_name_of_its_own():
    for runs in (FAULTS, HEALTHY):
        assert len({run.name for run in runs}) == len(runs)
    assert len(HEALTHY) >= 60


def test_the_scoreboard_counts_what_was_said():
    (fault,) = (fault for fault in FAULTS if fault.name == "weight decay on gamma")
    run = run_fault(fault, "conv", seed=5)
    swapped = FaultyRun(**{**vars(run), "faulty": run.twin, "code": "BN103"})
    accused = FaultyRun(**{**vars(run), "twin": poisoned(), "name": "with a bad twin"})
    text = scoreboard([swapped, accused], [HealthyRun("a healthy run", 5, run.twin)])
    (line,) = (line for line in text.splitlines() if line.startswith("all "))
    assert line.split()[1:3] == ["1/2", "50%"]
    assert "healthy runs accused  1 of 3 (2 twins, 1 others)" in text
    assert 'missed: BN103 weight decay on gamma, conv: python -m tests.zoo --only "BN103 we' in text
    (alarm,) = (line for line in text.splitlines() if line.startswith("false alarm: "))
    assert alarm.startswith("false alarm: BN103")
    assert "on the twin of BN109 with a bad twin, conv: python -m tests.zoo" in alarm


def poisoned():
    (fault,) = (fault for fault in FAULTS if fault.name == "momentum 0")
    return fault.watched(is_faulty=True, architecture="mlp", seed=5)
