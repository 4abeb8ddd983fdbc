"""From what was observed to what is wrong: every rule on every layer; pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from bnguard.findings import Finding, Severity, Skipped, worst_first
from bnguard.observe.history import History
from bnguard.rules import RULES, ExplainedRule, ModelRule, Rule
from bnguard.rules.explanations import Explanations


@dataclass(frozen=True)
class Conclusions:
    """What the rules say of a history.

    Attributes:
        findings: The worst first, each root cause before what it explains; among equals in the
            order of codes, then the furthest towards or beyond the limit first.
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
        for result in _results(rule, history, partial(Explanations, history, rules, findings)):
            if isinstance(result, Skipped):
                skipped.append(result)
            elif is_wanted(result):
                findings.append(result)
    explanations = Explanations(history, rules, findings)
    return Conclusions(tuple(_causes_first(findings, explanations)), tuple(skipped))


def _names_a_symptom(rule: Rule) -> bool:
    return isinstance(rule, ExplainedRule)


def _results(
    rule: Rule, history: History, explanations: Callable[[], Explanations]
) -> Iterator[Finding | Skipped]:
    if isinstance(rule, ExplainedRule):
        root = partial(explanations().root, rule.code)
        yield from _guarded(rule, None, partial(rule.check_because, history, root))
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


def _causes_first(findings: list[Finding], explanations: Explanations) -> list[Finding]:
    """Name the cause of each finding that has one, and put each root before its consequences."""
    chains = [explanations.chain(finding) for finding in findings]
    worst: dict[str, Severity] = {}
    for root, *_, finding in ([chain[0], *chain] for chain in chains):
        worst[root.code] = max(worst.get(root.code, Severity.INFO), finding.severity)

    def place(chain: list[Finding]) -> tuple[int, str, int, int, str, tuple[float, float]]:
        finding = chain[-1]
        # What is only good to know never stands before a fault.
        is_info = finding.severity is Severity.INFO
        severity = finding.severity if is_info else worst[chain[0].code]
        root = chain[0].code
        return (-severity, root, len(chain), -finding.severity, finding.code, worst_first(finding))

    return [
        dataclasses.replace(chain[-1], cause=chain[-2].code if len(chain) > 1 else None)
        for chain in sorted(chains, key=place)
    ]
