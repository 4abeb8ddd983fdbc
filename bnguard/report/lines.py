"""Findings in a line or two, for logs and a terminal where a training runs; counts in words."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TextIO

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


def show(text: str) -> None:
    """Print lines on the standard output, above a progress bar of tqdm or rich if there is one.

    Not by a bar of the trainer, which prints nothing before it has begun and after it has ended.
    """
    if sys.stdout is None:  # As in a program of Windows without a console.
        return
    # Where output goes to a file, the console of Windows has no Greek letters, and no arrows.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    printable = text.encode(encoding, "replace").decode(encoding)
    with above_bars(sys.stdout):
        # In one call. In a notebook, what rich puts in the place of stdout flushes itself with each
        # line that it draws, so that the rest of an open line is printed again and again.
        sys.stdout.write(f"{printable}\n")


def above_bars(stream: TextIO | None) -> AbstractContextManager[None]:
    """Take the bars of tqdm off a stream until something has been printed there."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or stream is None:
        return nullcontext()
    mode: AbstractContextManager[None] = tqdm.tqdm.external_write_mode(file=stream)
    return mode


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
