"""A small part of the zoo, with every fault once; ``python -m tests.zoo`` runs the whole."""

from __future__ import annotations

import pytest

from bnguard.rules import RULES
from tests.zoo.faults import FAULTS
from tests.zoo.healthy import HEALTHY
from tests.zoo.scoreboard import FaultyRun, HealthyRun, scoreboard

# Their data cannot be had in one process; they are tested on constructed histories.
SEVERAL_RANKS = {"BN106", "BN210"}
QUICK_HEALTHY = [run for run in HEALTHY if "batch" not in run.name and "lr" not in run.name]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.code} {fault.name}")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_fault_is_named_and_its_twin_is_not_accused(fault):
    architecture = fault.architectures[0]
    faulty = fault.watched(is_faulty=True, architecture=architecture, seed=5)
    twin = fault.watched(is_faulty=False, architecture=architecture, seed=5)
    run = FaultyRun(fault, architecture, 5, faulty, twin)
    assert run.is_named
    assert run.is_early or not fault.shows_early
    assert run.is_cause_first or not fault.is_cause
    assert twin.accusations == ()


@pytest.mark.parametrize("healthy", QUICK_HEALTHY[::5], ids=lambda healthy: healthy.name)
def test_a_healthy_run_is_accused_of_nothing(healthy):
    assert healthy.watched(seed=5).accusations == ()


def test_every_rule_has_a_fault():
    assert {fault.code for fault in FAULTS} | SEVERAL_RANKS == {rule.code for rule in RULES}


def test_there_are_enough_healthy_runs():
    assert len(HEALTHY) >= 60
    assert len({run.name for run in HEALTHY}) == len(HEALTHY)


def test_the_scoreboard_counts_what_was_said():
    fault, healthy = FAULTS[0], HEALTHY[0]
    architecture = fault.architectures[0]
    faulty = fault.watched(is_faulty=True, architecture=architecture, seed=5)
    twin = fault.watched(is_faulty=False, architecture=architecture, seed=5)
    swapped = FaultyRun(fault, architecture, 5, faulty=twin, twin=faulty)
    text = scoreboard([swapped], [HealthyRun(healthy, 5, faulty)])
    assert "recall over all faults      0/1" in text
    assert "healthy runs accused        2 of 2 (1 twins, 1 others)" in text
