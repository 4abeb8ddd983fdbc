"""The scoreboard of the zoo: recall, precision, false alarms, steps until a fault is named."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

from bnguard.rules import rule_named
from tests.zoo.peer import INSTALL
from tests.zoo.runs import FaultyRun, HealthyRun

HEADER = ("rule", "recall", "precision", "step", "early", "cause first", "torch-audit", "its twins")
WIDTHS = (34, 9, 11, 6, 8, 13, 13, 11)


def scoreboard(faulty: Sequence[FaultyRun], healthy: Sequence[HealthyRun]) -> str:
    """Return the scoreboard as text: a line a rule, the figures over all, and what went wrong."""
    accused = _accused(faulty, healthy)
    codes = sorted({run.code for run in faulty})
    lines = [_row(HEADER)]
    lines += [
        _line(f"{code} {rule_named(code).name}", [r for r in faulty if r.code == code], accused)
        for code in codes
    ]
    lines += [_line("all", faulty, accused), "", *_legend(faulty), ""]
    runs = len(faulty) + len(healthy)
    alarms = sum(len(named) for named in accused.values())
    lines += [
        f"healthy runs accused  {len(accused)} of {runs} ({len(faulty)} twins, "
        f"{len(healthy)} others)",
        f"false alarms a run    {alarms / runs if runs else 0.0:.4f}",
        *_went_wrong(faulty),
        *(
            f"false alarm: {', '.join(named)} on {where}: {_again(name, seed)}"
            for (where, name, seed), named in accused.items()
        ),
    ]
    return "\n".join(lines)


# Title of a healthy run, then what --only and --seeds make it again.
Place = tuple[str, str, int]


def _line(title: str, runs: Sequence[FaultyRun], accused: dict[Place, tuple[str, ...]]) -> str:
    codes = {run.code for run in runs}
    named = [run for run in runs if run.is_named]
    wrong = sum(code in codes for alarms in accused.values() for code in alarms)
    steps = [run.step for run in named if run.step is not None and run.faulty.steps]
    audits = [run.audit for run in runs if run.audit is not None]
    return _row(
        (
            title,
            _share(run.is_named for run in runs),
            f"{len(named) / (len(named) + wrong):.0%}" if named or wrong else "–",
            f"{statistics.median(steps):.0f}" if steps else "–",
            _share(run.is_early for run in runs if run.shows_early),
            _share(run.is_cause_first for run in runs if run.is_cause),
            _share(audit.is_named for audit in audits),
            _share(audit.is_twin_accused for audit in audits),
        )
    )


def _legend(faulty: Sequence[FaultyRun]) -> Iterator[str]:
    yield "step: at which it was named, the median; 0 is before the first batch, – without training"
    yield "early: named before a quarter of the run was over, of what shows early"
    yield "cause first: named before its consequences, of what is a cause of drift"
    if any(run.audit is not None for run in faulty):
        yield "torch-audit: named by its matching check; its twins: healthy twins it accuses of it"
    else:
        yield f"torch-audit: not installed, so not compared; {INSTALL}"


def _accused(
    faulty: Iterable[FaultyRun], healthy: Iterable[HealthyRun]
) -> dict[Place, tuple[str, ...]]:
    """Return the codes of warnings and errors by the healthy run that they accused."""
    alarms: dict[Place, tuple[str, ...]] = {
        (f"the twin of {run.title}", run.title, run.seed): run.twin.accusations for run in faulty
    }
    alarms |= {(run.name, run.name, run.seed): run.watched.accusations for run in healthy}
    return {place: codes for place, codes in alarms.items() if codes}


def _went_wrong(faulty: Iterable[FaultyRun]) -> Iterator[str]:
    for run in faulty:
        if not run.is_named:
            problem = "missed"
        elif run.shows_early and not run.is_early:
            problem = f"late, at step {run.step} of {run.faulty.steps}"
        elif run.is_cause and not run.is_cause_first:
            worst = next(iter(run.faulty.report.findings), None)
            problem = f"not first, but {'nothing' if worst is None else worst.code}"
        else:
            continue
        yield f"{problem}: {run.title}: {_again(run.title, run.seed)}"


def _again(name: str, seed: int) -> str:
    return f'python -m tests.zoo --only "{name}" --seeds {seed}'


def _share(flags: Iterable[bool]) -> str:
    flags = list(flags)
    return f"{sum(flags)}/{len(flags)}" if flags else "–"


def _row(cells: Sequence[str]) -> str:
    first, *rest = (
        f"{cell:<{width}}" if index == 0 else f"{cell:>{width}}"
        for index, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    )
    return (first + "".join(rest)).rstrip()
