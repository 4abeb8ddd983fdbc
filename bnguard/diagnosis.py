"""From what was observed to what is wrong: every rule on every layer; pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from bnguard.findings import Finding, Severity, Skipped
from bnguard.history import History
from bnguard.rules import RULES, ModelRule, Rule


@dataclass(frozen=True)
class Conclusions:
    """What the rules say of a history.

    Attributes:
        findings: The worst first, each root cause before what it explains; among equals in the
            order of codes, then of layers.
        skipped: What could not be told, and why.
    """

    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...]


def diagnose(
    history: History,
    rules: Iterable[Rule] = RULES,
    is_wanted: Callable[[Finding], bool] = lambda finding: True,
) -> Conclusions:
    """Run the rules over a history.

    A rule that raises, one of the user's own perhaps, is reported as skipped with its error:
    watching never ends a run.

    Args:
        history: What was observed.
        rules: The rules to run.
        is_wanted: Whether a finding is to be kept; what is not explains no other either.
    """
    rules = tuple(rules)
    results = [result for rule in rules for result in _results(rule, history)]
    findings = [result for result in results if isinstance(result, Finding) and is_wanted(result)]
    return Conclusions(
        findings=tuple(_causes_first(findings, rules)),
        skipped=tuple(result for result in results if isinstance(result, Skipped)),
    )


def _results(rule: Rule, history: History) -> Iterator[Finding | Skipped]:
    if isinstance(rule, ModelRule):
        yield from _guarded(rule, None, partial(rule.check_model, history))
        return
    for layer in history.layers:
        yield from _guarded(rule, layer.name, partial(rule.check, layer))


def _guarded(
    rule: Rule, layer: str | None, check: Callable[[], Iterator[Finding | Skipped]]
) -> Iterator[Finding | Skipped]:
    try:
        yield from check()
    except Exception as error:
        yield Skipped(rule.code, layer, f"the rule failed with {type(error).__name__}: {error}")


def _causes_first(findings: list[Finding], rules: Iterable[Rule]) -> list[Finding]:
    """Name the cause of each finding that has one, and put each root before its consequences."""
    present = {finding.code for finding in findings if finding.severity > Severity.INFO}
    causes = _causes(present, rules)
    # A rule that measured its cause knows better than the table.
    causes |= {f.code: f.cause for f in findings if f.cause is not None and f.cause in present}
    named = [dataclasses.replace(finding, cause=causes.get(finding.code)) for finding in findings]
    chains = {finding.code: _chain(finding.code, causes) for finding in findings}
    worst: dict[str, Severity] = {}
    for finding in findings:
        root = chains[finding.code][0]
        worst[root] = max(worst.get(root, Severity.INFO), finding.severity)

    def place(finding: Finding) -> tuple[int, str, int, int, str]:
        chain = chains[finding.code]
        # What is only good to know never stands before a fault.
        is_info = finding.severity is Severity.INFO
        severity = finding.severity if is_info else worst[chain[0]]
        return (-severity, chain[0], len(chain), -finding.severity, finding.code)

    return sorted(named, key=place)


def _causes(present: set[str], rules: Iterable[Rule]) -> dict[str, str]:
    """Return the code of the cause by the code of each rule whose findings are explained."""
    causes: dict[str, str] = {}
    for rule in rules:
        if rule.code in present:
            for code in rule.explains:
                causes.setdefault(code, rule.code)
    return causes


def _chain(code: str, causes: dict[str, str]) -> list[str]:
    """Return the codes from the root cause to this one; rules that explain each other end it."""
    chain = [code]
    while chain[0] in causes and causes[chain[0]] not in chain:
        chain.insert(0, causes[chain[0]])
    return chain
