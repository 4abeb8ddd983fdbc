"""Findings in a line or two, for logs and a terminal where a training runs; counts in words."""

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


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number of things in words.

    >>> counted(1, "layer"), counted(2, "layer"), counted(1024, "batch", "batches")
    ('1 layer', '2 layers', '1,024 batches')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _heading(group: FindingGroup) -> str:
    worst = group.worst
    when = "" if group.step is None else f", step {group.step}"
    return f"{worst.code} {worst.name} at {group.where}{when}"
