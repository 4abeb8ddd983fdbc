"""The scoreboard of the zoo: recall, precision, false alarms, steps until a fault is named."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from bnguard.findings import Severity
from bnguard.rules import rule_named
from tests.zoo.fault import Fault, Healthy
from tests.zoo.training import Watched

# What shows early has to be named before this share of the run is over.
EARLY = 0.25


@dataclass(frozen=True)
class FaultyRun:
    """What was said of a run with a fault, and of its twin without it."""

    fault: Fault
    architecture: str
    seed: int
    faulty: Watched
    twin: Watched

    @property
    def is_named(self) -> bool:
        return self.named_at is not None

    @property
    def named_at(self) -> float | None:
        """The share of the run after which the fault was named; 0 before training."""
        step = self.faulty.first_step(self.fault.code, self.fault.severity)
        return None if step is None else step / max(self.faulty.steps, 1)

    @property
    def is_early(self) -> bool:
        return self.named_at is not None and self.named_at <= EARLY

    @property
    def is_cause_first(self) -> bool:
        """Whether the first of the warnings and errors at the end is the fault itself."""
        worst = [f for f in self.faulty.report.findings if f.severity > Severity.INFO]
        return bool(worst) and worst[0].code == self.fault.code


@dataclass(frozen=True)
class HealthyRun:
    """What was said of a healthy run."""

    healthy: Healthy
    seed: int
    watched: Watched


def run_faults(faults: Iterable[Fault], seeds: Iterable[int]) -> list[FaultyRun]:
    return [
        FaultyRun(
            fault,
            architecture,
            seed,
            fault.watched(is_faulty=True, architecture=architecture, seed=seed),
            fault.watched(is_faulty=False, architecture=architecture, seed=seed),
        )
        for seed in seeds
        for fault in faults
        for architecture in fault.architectures
    ]


def run_healthy(healthy: Iterable[Healthy], seeds: Iterable[int]) -> list[HealthyRun]:
    return [HealthyRun(run, seed, run.watched(seed)) for seed in seeds for run in healthy]


def scoreboard(faulty: list[FaultyRun], healthy: list[HealthyRun]) -> str:
    """Return the scoreboard as text: a line a rule, the figures over all, and what went wrong."""
    false_alarms = _false_alarms(faulty, healthy)
    lines = [f"{'rule':<32}{'recall':>9}{'precision':>11}{'cause first':>13}{'named at':>10}"]
    lines += [
        _line(code, [run for run in faulty if run.fault.code == code], false_alarms)
        for code in sorted({run.fault.code for run in faulty})
    ]
    early = [run for run in faulty if run.fault.shows_early]
    causes = [run for run in faulty if run.fault.is_cause]
    runs = len(faulty) + len(healthy)
    accused = sum(bool(run.twin.accusations) for run in faulty) + sum(
        bool(run.watched.accusations) for run in healthy
    )
    lines += [
        "",
        f"recall over all faults      {_share(run.is_named for run in faulty)}",
        f"named in the first quarter  {_share(run.is_early for run in early)}",
        f"right cause first           {_share(run.is_cause_first for run in causes)}",
        f"healthy runs accused        {accused} of {runs} ({len(faulty)} twins, "
        f"{len(healthy)} others)",
        *_misses(faulty),
        *(f"accused: {where}: {', '.join(codes)}" for where, codes in false_alarms.items()),
    ]
    return "\n".join(lines)


def _line(code: str, runs: list[FaultyRun], false_alarms: dict[str, tuple[str, ...]]) -> str:
    named = [run for run in runs if run.is_named]
    wrong = sum(code in codes for codes in false_alarms.values())
    precision = len(named) / (len(named) + wrong) if named or wrong else 0.0
    causes = [run for run in runs if run.fault.is_cause]
    first = _share(run.is_cause_first for run in causes) if causes else "–"
    shares = [run.named_at for run in named if run.named_at is not None]
    when = f"{statistics.median(shares):.0%}" if shares else "–"
    title = f"{code} {rule_named(code).name}"
    recall = f"{len(named)}/{len(runs)}"
    return f"{title:<32}{recall:>9}{precision:>11.0%}{first:>13}{when:>10}"


def _false_alarms(faulty: list[FaultyRun], healthy: list[HealthyRun]) -> dict[str, tuple[str, ...]]:
    """Return the codes by the healthy run that they accused."""
    alarms = {
        f"twin of {run.fault.name}, {run.architecture}, seed {run.seed}": run.twin.accusations
        for run in faulty
    }
    alarms |= {f"{run.healthy.name}, seed {run.seed}": run.watched.accusations for run in healthy}
    return {where: codes for where, codes in alarms.items() if codes}


def _misses(faulty: list[FaultyRun]) -> list[str]:
    missed: dict[str, list[str]] = defaultdict(list)
    for run in faulty:
        where = f"{run.fault.code} {run.fault.name}, {run.architecture}, seed {run.seed}"
        if not run.is_named:
            missed["missed"].append(where)
        elif run.fault.shows_early and not run.is_early:
            missed["late"].append(where)
        elif run.fault.is_cause and not run.is_cause_first:
            missed["not first"].append(where)
    return [f"{kind}: {where}" for kind, places in missed.items() for where in places]


def _share(flags: Iterable[bool]) -> str:
    flags = list(flags)
    return f"{sum(flags)}/{len(flags)}"
