"""What a rule concludes: a finding with evidence and fix, or the reason why it is unknown."""

from __future__ import annotations

import dataclasses
import enum
import math
import shlex
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TextIO

from bnguard.layers.names import layer_label

# Of the natural logarithm of a factor.
LOGARITHM = "ln"


class Severity(enum.IntEnum):
    """How bad a finding is: an error breaks the model, a warning costs quality, info does not.

    >>> Severity.ERROR > Severity.WARNING, str(Severity.INFO)
    (True, 'info')
    """

    INFO = 1
    WARNING = 2
    ERROR = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Evidence:
    """One measured number against one limit.

    Attributes:
        measure: What was measured, as a noun: ``"largest shift"``.
        value: The number measured.
        limit: The limit of that number; NaN if it has none.
        unit: Unit of both, ``""`` for a plain number; ``LOGARITHM`` for the natural logarithm of a
            factor, which people read as the factor.
        is_minimum: Whether the limit is a minimum; by default it is a maximum.

    Example:
        >>> str(Evidence("largest shift", 2.25, 1.0, "σ"))
        'largest shift 2.25 σ (limit 1 σ)'
        >>> str(Evidence("values per channel", 2, 3, is_minimum=True))
        'values per channel 2 (at least 3)'
        >>> str(Evidence("variance off by", 7.329, 1.5, LOGARITHM))
        'variance off by 1,500× (limit 4.5×)'
    """

    measure: str
    value: float
    limit: float
    unit: str = ""
    is_minimum: bool = False

    @property
    def excess(self) -> float:
        """The value relative to the limit: above 1 is beyond it; infinite beyond a limit of 0."""
        if math.isnan(self.limit):
            return 0.0
        value, limit = abs(self.value), abs(self.limit)
        near, far = (value, limit) if self.is_minimum and limit else (limit, value)
        if not math.isfinite(value) or near == 0.0:
            return math.inf if far else 0.0
        return far / near

    def amount(self, number: float) -> str:
        """Return a number of this measure with its unit, or as a factor: 2.25 σ, 4.5×."""
        if self.unit == LOGARITHM and math.isfinite(number):
            return factor(number)
        is_short = float(number).is_integer() and abs(number) < 1e6
        figures = f"{number:,.0f}" if is_short else f"{number:.4g}"
        return figures + ("" if self.unit in ("", "%") else " ") + self.unit

    @property
    def reading(self) -> str:
        """The measure and its value, without the limit: largest shift 2.25 σ."""
        return f"{self.measure} {self.amount(self.value)}"

    def __str__(self) -> str:
        bound = "at least" if self.is_minimum else "limit"
        limit = "" if math.isnan(self.limit) else f" ({bound} {self.amount(self.limit)})"
        return f"{self.reading}{limit}"


def factor(log_ratio: float) -> str:
    """Return the logarithm of a ratio as a factor of two figures, whichever is larger.

    >>> factor(-1.5), factor(7.329), factor(1e9)
    ('4.5×', '1,500×', '1e+304×')
    """
    size = math.exp(min(abs(log_ratio), 700.0))
    return f"{float(f'{size:.2g}'):,.6g}×"


# Placeholders for the model and its data in a command.
SUBJECTS = "--model PACKAGE.CLASS --data PACKAGE.CLASS"


@dataclass(frozen=True)
class Fix:
    """What a finding proposes.

    Attributes:
        summary: The next step in one sentence.
        repair: The command, and function, that does it: ``"recalibrate"`` or ``"swap"``; None if
            the user's own code has to change.
    """

    summary: str
    repair: str | None = None

    @property
    def call(self) -> str:
        """The call that does it to a model in memory; empty if the user has to change code."""
        return _CALLS.get(self.repair or "", "")

    def command(self, checkpoint: str = "CKPT", subjects: str = SUBJECTS) -> str:
        """Return the command that does it to a checkpoint; empty as :attr:`call`.

        ``subjects`` are the options that name the model and its data.

        >>> Fix("", "swap").command("a b.ckpt", "--model my.Net --data my.Data")
        "bnguard swap 'a b.ckpt' --model my.Net --data my.Data"
        """
        words = f"bnguard {self.repair} {shlex.quote(checkpoint)} {subjects}"
        return words if self.repair in _CALLS else ""


_CALLS = {
    "recalibrate": "bnguard.recalibrate(model, train_loader)",
    "swap": 'bnguard.swap(model, to="group")',
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A rule's conclusion about a layer, or about the model.

    Attributes:
        code: Code of the rule, as in ``BN301``.
        name: Name of the rule, as in ``statistic-drift``.
        severity: How bad it is.
        layer: Dotted name of the layer; None if the finding is about the whole model.
        message: What is wrong, in one sentence.
        evidence: The number that shows it.
        reasons: The numbers that show the cause, if the message names one.
        fix: What to do about it.
        channels: Indices of the channels concerned, worst first; empty if it is all of them.
        step: First step from which the value is beyond its limit, None if there was no training.
        cause: Code of a finding of the same report that explains this one; None for a root cause.
    """

    code: str
    name: str
    severity: Severity
    layer: str | None
    message: str
    evidence: Evidence
    fix: Fix
    reasons: tuple[Evidence, ...] = ()
    channels: tuple[int, ...] = ()
    step: int | None = None
    cause: str | None = None

    @property
    def key(self) -> tuple[str, Severity, str | None]:
        """What identifies a finding over time."""
        return (self.code, self.severity, self.layer)

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain data; see :mod:`bnguard.report.json_document`."""
        content = dataclasses.asdict(self)
        for key in ("reasons", "channels"):
            content[key] = list(content[key])
        return {**content, "severity": str(self.severity)}


@dataclass(frozen=True, kw_only=True)
class PastFinding:
    """A warning or error that was announced, and may be over.

    Attributes:
        code: Code of the rule.
        name: Name of the rule.
        severity: How bad it was: ``warning`` or ``error``.
        layer: Dotted name of the layer; None for the whole model.
        message: What was wrong, in one sentence.
        evidence: The number that showed it, in words.
        first_step: First step at which it held.
        last_step: Last step at which it held.
    """

    code: str
    name: str
    severity: str
    layer: str | None
    message: str
    evidence: str
    first_step: int
    last_step: int


@dataclass(frozen=True)
class FindingGroup:
    """Findings of one rule and severity, either root causes or consequences.

    Attributes:
        findings: The largest relative to its limit first, then the earliest.
    """

    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Finding:
        """The finding that speaks for the group."""
        return self.findings[0]

    @property
    def step(self) -> int | None:
        """The first step in which one of the findings showed; None if there was no training."""
        return min((f.step for f in self.findings if f.step is not None), default=None)

    @property
    def causes(self) -> tuple[str, ...]:
        """The codes of the causes, that of the worst finding first; empty for root causes."""
        causes = (finding.cause for finding in self.findings)
        return tuple(dict.fromkeys(cause for cause in causes if cause is not None))

    @property
    def where(self) -> str:
        """The layers in words: one name, or how many and the worst of them."""
        name = layer_label(self.worst.layer)
        return name if len(self.findings) == 1 else f"{len(self.findings)} layers, worst {name}"


def group_findings(findings: Iterable[Finding]) -> tuple[FindingGroup, ...]:
    """Return the findings by rule and severity, in the order given; consequences separately."""
    groups: dict[tuple[str, Severity, bool], list[Finding]] = {}
    for finding in findings:
        key = (finding.code, finding.severity, finding.cause is None)
        groups.setdefault(key, []).append(finding)
    return tuple(FindingGroup(tuple(sorted(group, key=worst_first))) for group in groups.values())


def by_root_cause(groups: Iterable[FindingGroup]) -> dict[FindingGroup, list[FindingGroup]]:
    """Return each root cause with what it leads to, both in the order given."""
    groups = tuple(groups)
    by_code = {group.worst.code: group for group in reversed(groups)}
    consequences: dict[FindingGroup, list[FindingGroup]] = {}
    for group in groups:
        root, codes = group, {group.worst.code}
        while (code := next(iter(root.causes), "")) in by_code and code not in codes:
            root = by_code[code]
            codes.add(code)
        consequences.setdefault(root, [])
        if root is not group:
            consequences[root].append(group)
    return consequences


def worst_first(finding: Finding) -> tuple[float, float]:
    """Return the sort key of one rule's findings, the same in every view."""
    return (-finding.evidence.excess, math.inf if finding.step is None else finding.step)


@dataclass(frozen=True)
class Skipped:
    """A rule that could not decide, and why.

    Attributes:
        code: Code of the rule.
        layer: Dotted name of the layer; None for the whole model.
        reason: What was missing.
        is_failure: Whether the rule raised an exception.
    """

    code: str
    layer: str | None
    reason: str
    is_failure: bool = False


def one_line(group: FindingGroup) -> str:
    """Return findings in one line: code, name, layer, step, message, evidence, fix."""
    worst = group.worst
    return f"{_first_line(group)}: {worst.message}; {worst.evidence}. Fix: {worst.fix.summary}"


def notice(group: FindingGroup) -> str:
    """Return findings in two lines for the terminal of a training: layers; message and fix."""
    worst = group.worst
    heading = f"bnguard: {worst.severity}: {_first_line(group)}"
    return f"{heading}\n  {worst.message} → {worst.fix.summary}"


def show(text: str) -> None:
    """Print lines on the standard output, above a progress bar of tqdm or rich."""
    if sys.stdout is None:  # On Windows, without a console.
        return
    # On Windows, the encoding of a file may have no Greek letters and arrows.
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    printable = text.encode(encoding, "replace").decode(encoding)
    with above_bars(sys.stdout):
        # In one call: in a notebook, rich's stdout would print an open line again and again.
        sys.stdout.write(f"{printable}\n")


def above_bars(stream: TextIO | None) -> AbstractContextManager[None]:
    """Clear the bars of tqdm on a stream while something is printed there."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is None or stream is None:
        return nullcontext()
    mode: AbstractContextManager[None] = tqdm.tqdm.external_write_mode(file=stream)
    return mode


def counted(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun.

    >>> counted(1, "layer"), counted(2, "layer"), counted(1024, "batch", "batches")
    ('1 layer', '2 layers', '1,024 batches')
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _first_line(group: FindingGroup) -> str:
    worst = group.worst
    when = "" if group.step is None else f", step {group.step}"
    return f"{worst.code} {worst.name} at {group.where}{when}"
