"""Runs the zoo, on several processes, and keeps what was said of each run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

import torch

from bnguard.findings import Severity
from tests.zoo import peer
from tests.zoo.fault import Fault
from tests.zoo.faults import FAULTS
from tests.zoo.healthy import HEALTHY
from tests.zoo.peer import Audit
from tests.zoo.training import Watched

# What shows early has to be named before this share of the run is over.
EARLY = 0.25

Result = TypeVar("Result")
Job = Callable[[], Result]


@dataclass(frozen=True)
class FaultyRun:
    """What was said of a run with a fault, and of its twin without it.

    Attributes:
        code: Code of the rule that has to name the fault.
        name: Name of the fault.
        architecture: What it was run on.
        seed: What both runs began from.
        severity: The least that the finding has to have.
        shows_early: Whether it has to be named before a quarter of the run is over.
        is_cause: Whether it has to be the first of the findings.
        faulty: What bnguard said of the run.
        twin: What it said of the run without the fault.
        audit: What torch-audit said of both; None where it has no check for the fault.
    """

    code: str
    name: str
    architecture: str
    seed: int
    severity: Severity
    shows_early: bool
    is_cause: bool
    faulty: Watched
    twin: Watched
    audit: Audit | None = None

    @property
    def title(self) -> str:
        return f"{self.code} {self.name}, {self.architecture}"

    @property
    def step(self) -> int | None:
        """The step at which the fault was named; 0 before training, None where it was not."""
        return self.faulty.first_step(self.code, self.severity)

    @property
    def is_named(self) -> bool:
        return self.step is not None

    @property
    def is_early(self) -> bool:
        return self.step is not None and self.step <= EARLY * self.faulty.steps

    @property
    def is_cause_first(self) -> bool:
        """Whether the first of the warnings and errors at the end is the fault itself."""
        worst = [f for f in self.faulty.report.findings if f.severity > Severity.INFO]
        return bool(worst) and worst[0].code == self.code


@dataclass(frozen=True)
class HealthyRun:
    """What was said of a healthy run."""

    name: str
    seed: int
    watched: Watched


def run_fault(fault: Fault, architecture: str, seed: int, *, is_audited: bool = False) -> FaultyRun:
    """Run a fault and its twin; and both again with torch-audit in the place of bnguard."""
    run = partial(fault.watched, architecture=architecture, seed=seed)
    return FaultyRun(
        code=fault.code,
        name=fault.name,
        architecture=architecture,
        seed=seed,
        severity=fault.severity,
        shows_early=fault.shows_early,
        is_cause=fault.is_cause,
        faulty=run(is_faulty=True),
        twin=run(is_faulty=False),
        audit=peer.audit(fault.code, run) if is_audited else None,
    )


def run_zoo(
    seeds: Sequence[int], *, only: str = "", jobs: int = 1
) -> tuple[list[FaultyRun], list[HealthyRun]]:
    """Run the faults and the healthy runs whose names contain ``only``, on several processes."""
    is_audited = peer.is_installed()
    faulty: list[Job[FaultyRun]] = [
        partial(_fault_named, fault.name, architecture, seed, is_audited)
        for seed in seeds
        for fault in FAULTS
        for architecture in fault.architectures
        if only in f"{fault.code} {fault.name}, {architecture}"
    ]
    healthy: list[Job[HealthyRun]] = [
        partial(_healthy_named, run.name, seed)
        for seed in seeds
        for run in HEALTHY
        if only in run.name
    ]
    if jobs == 1:
        quiet()
        return [job() for job in faulty], [job() for job in healthy]
    # Spawned, since a fork of a process in which torch has threads may hang.
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=quiet) as pool:
        runs = pool.map(_run, faulty), pool.map(_run, healthy)
        return list(runs[0]), list(runs[1])


def quiet() -> None:
    """Use one thread a process, and say nothing of what the faults set off."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("bnguard", "pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


# What goes to another process is a name: runs are made of closures, which cannot be pickled.


def _fault_named(name: str, architecture: str, seed: int, is_audited: bool) -> FaultyRun:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    return run_fault(fault, architecture, seed, is_audited=is_audited)


def _healthy_named(name: str, seed: int) -> HealthyRun:
    (healthy,) = (run for run in HEALTHY if run.name == name)
    return HealthyRun(name, seed, healthy.watched(seed))


def _run(job: Job[Result]) -> Result:
    return job()


def architectures_by_rule(
    faults: Iterable[Fault] = FAULTS,
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the architectures of each fault, by its name, by the code of its rule."""
    rules: dict[str, dict[str, tuple[str, ...]]] = {}
    for fault in faults:
        rules.setdefault(fault.code, {})[fault.name] = fault.architectures
    return rules
