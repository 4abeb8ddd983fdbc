"""From what was observed to what is wrong: every rule on every layer; pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from bnguard.findings import Finding, Severity, Skipped, group_findings
from bnguard.history import History
from bnguard.rules import RULES, ExplainedRule, ModelRule, Rule


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
    """Run the rules over a history: causes first, then the symptoms that they explain.

    A rule that raises, one of the user's own perhaps, is reported as skipped with its error:
    watching never ends a run.

    Args:
        history: What was observed.
        rules: The rules to run.
        is_wanted: Whether a finding is to be kept; what is not explains no other either.
    """
    rules = tuple(rules)
    findings: list[Finding] = []
    skipped: list[Skipped] = []
    for rule in sorted(rules, key=_names_a_symptom):
        for result in _results(rule, history, partial(_cause_of, rule, tuple(findings), rules)):
            if isinstance(result, Skipped):
                skipped.append(result)
            elif is_wanted(result):
                findings.append(result)
    return Conclusions(tuple(_causes_first(findings, rules)), tuple(skipped))


def _names_a_symptom(rule: Rule) -> bool:
    return isinstance(rule, ExplainedRule)


def _results(
    rule: Rule, history: History, cause: Callable[[], Finding | None]
) -> Iterator[Finding | Skipped]:
    if isinstance(rule, ExplainedRule):
        yield from _guarded(rule, None, partial(rule.check_because, history, cause()))
    elif isinstance(rule, ModelRule):
        yield from _guarded(rule, None, partial(rule.check_model, history))
    else:
        for layer in history.layers:
            yield from _guarded(rule, layer.name, partial(rule.check, layer))


def _guarded(
    rule: Rule, layer: str | None, check: Callable[[], Iterator[Finding | Skipped]]
) -> Iterator[Finding | Skipped]:
    try:
        for result in check():
            if not isinstance(result, Finding | Skipped):
                raise TypeError(f"a rule yields Finding or Skipped, not {type(result).__name__}")
            yield result
    except Exception as error:
        reason = f"the rule failed with {type(error).__name__}: {error}"
        yield Skipped(rule.code, layer, reason, is_failure=True)


def _cause_of(rule: Rule, findings: Collection[Finding], rules: Iterable[Rule]) -> Finding | None:
    """Return the root of what was found so far and explains a rule, at its worst layer."""
    present = _accused(findings)
    root = _chain(rule.code, _causes({*present, rule.code}, rules))[0]
    groups = group_findings(f for f in findings if f.code == root and f.severity > Severity.INFO)
    return groups[0].worst if groups and root != rule.code else None


def _accused(findings: Iterable[Finding]) -> set[str]:
    """Return the codes that stand for a fault; what is only good to know explains nothing."""
    return {finding.code for finding in findings if finding.severity > Severity.INFO}


def _causes_first(findings: list[Finding], rules: Iterable[Rule]) -> list[Finding]:
    """Name the cause of each finding that has one, and put each root before its consequences."""
    present = _accused(findings)
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


def _causes(present: Collection[str], rules: Iterable[Rule]) -> dict[str, str]:
    """Return the code of the nearest cause by the code of each rule that has one.

    Of several the nearest is one that explains no other of them, so that a chain is told in full;
    of several such the one with the highest code, since what was measured in evaluation, or is not
    finite, knows more of a symptom than a setting does.
    """
    explains = {rule.code: set(rule.explains) for rule in rules if rule.code in present}
    causes: dict[str, str] = {}
    for code in present:
        candidates = {cause for cause, consequences in explains.items() if code in consequences}
        nearest = {cause for cause in candidates if not explains[cause] & (candidates - {cause})}
        if candidates:
            causes[code] = max(nearest or candidates)
    return causes


def _chain(code: str, causes: Mapping[str, str]) -> list[str]:
    """Return the codes from the root cause to this one; rules that explain each other end it."""
    chain = [code]
    while chain[0] in causes and causes[chain[0]] not in chain:
        chain.insert(0, causes[chain[0]])
    return chain
