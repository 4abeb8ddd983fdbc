"""Findings in a line or two, for logs and for a terminal where a training runs."""

from __future__ import annotations

from bnguard.findings import FindingGroup


def one_line(group: FindingGroup) -> str:
    """Return findings in one line: code, name, where, step, what, evidence, fix."""
    worst = group.worst
    return f"{_heading(group)}: {worst.message}; {worst.evidence}. Fix: {worst.fix.summary}"


def notice(group: FindingGroup) -> str:
    """Return findings in two lines, for a terminal where a training runs: where; what, and fix."""
    worst = group.worst
    heading = f"bnguard: {worst.severity}: {_heading(group)}"
    return f"{heading}\n  {worst.message} → {worst.fix.summary}"


def _heading(group: FindingGroup) -> str:
    worst = group.worst
    when = "" if worst.step is None else f", step {worst.step}"
    return f"{worst.code} {worst.name} at {group.where}{when}"
