"""Runs every rule on every layer, and sorts causes before symptoms.

:class:`Explanations` names a finding as the cause of another only if it can have caused it;
:class:`Announcements` remembers findings over the checks of a training.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bnguard.findings import (
    Finding,
    FindingGroup,
    PastFinding,
    Severity,
    Skipped,
    group_findings,
    worst_first,
)
from bnguard.observe.history import History, LayerHistory
from bnguard.rules import RULES, ExplainedRule, ModelRule, Rule

_Key = tuple[str, Severity, str | None]
_Place = tuple[str, str | None]


def run_rules(
    history: History,
    rules: Iterable[Rule] = RULES,
    is_wanted: Callable[[Finding], bool] = lambda finding: True,
) -> Conclusions:
    """Run the rules over a history: causes first, then the symptoms that they explain.

    A rule that raises is reported as skipped with its error: watching never ends a run.

    Args:
        history: What was observed.
        rules: The rules to run.
        is_wanted: Whether to keep a finding; one that is not kept explains no other either.
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


@dataclass(frozen=True)
class Conclusions:
    """What the rules found in a history.

    Attributes:
        findings: The worst first, each root cause before what it explains; among equals by code,
            then by evidence relative to the limit.
        skipped: What is unknown, and why.
    """

    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...]


class Explanations:
    """The causes among the findings of a history.

    Args:
        history: What was observed.
        rules: The rules that ran.
        findings: What they found; ``info`` explains nothing.
    """

    def __init__(
        self, history: History, rules: Iterable[Rule], findings: Iterable[Finding]
    ) -> None:
        self._rules = {rule.code: rule for rule in rules}
        self._layers = {layer.name: layer for layer in history.layers}
        self._has_done_harm = functools.cache(self._has_harmed)
        evaluated = [layer.evaluated.step for layer in history.layers if layer.evaluated]
        self._newest_evaluation = max(evaluated, default=None)
        accused = [finding for finding in findings if finding.severity > Severity.INFO]
        self._by_code: dict[str, list[Finding]] = {}
        for group in group_findings(accused):
            self._by_code.setdefault(group.worst.code, []).extend(group.findings)

    def chain(self, finding: Finding) -> list[Finding]:
        """Return what explains a finding, the root cause first, and the finding itself last."""
        symptom = _Symptom(finding.code, finding.layer, self._moment(finding), finding.cause)
        return [*self._causes(symptom), finding]

    def root(self, code: str, layer: LayerHistory | None) -> Finding | None:
        """Return the root cause of a symptom in the newest evaluation.

        Args:
            code: Code of the rule.
            layer: The layer concerned; None for the model.
        """
        seen = None if layer is None else layer.evaluated
        step = self._newest_evaluation if seen is None else seen.step
        causes = self._causes(_Symptom(code, None if layer is None else layer.name, step))
        return causes[0] if causes else None

    def _causes(self, symptom: _Symptom) -> list[Finding]:
        chain: list[Finding] = []
        while (cause := self._cause(symptom)) is not None:
            # Rules that explain each other end the chain.
            if cause.code in {symptom.code, *(finding.code for finding in chain)}:
                break
            chain.insert(0, cause)
            symptom = _Symptom(cause.code, cause.layer, self._moment(cause), cause.cause)
        return chain

    def _cause(self, symptom: _Symptom) -> Finding | None:
        """Return the nearest cause.

        Of several causes it is one that explains no other of them, so that the chain is complete,
        and among those the one with the highest code: a measurement in evaluation, or NaN, is
        closer to a symptom than a setting.
        """
        if symptom.cause in self._by_code:  # The rule measured its cause.
            return self._by_code[symptom.cause][0]
        found: dict[str, Finding] = {}
        for code, findings in self._by_code.items():
            rule = self._rules[code]
            if symptom.code in rule.explains:
                # A cause at the layer itself comes before the worst one.
                ordered = sorted(findings, key=lambda finding: finding.layer != symptom.layer)
                cause = next((f for f in ordered if self._can_make(rule, f, symptom)), None)
                if cause is not None:
                    found[code] = cause
        nearest = [c for c in found if not set(self._rules[c].explains) & (found.keys() - {c})]
        return found[max(nearest or found)] if found else None

    def _can_make(self, rule: Rule, cause: Finding, symptom: _Symptom) -> bool:
        """Return whether a finding can be the cause of a symptom: its place, step and harm."""
        if cause.step is not None and symptom.step is not None and cause.step > symptom.step:
            return False
        if cause.layer is None:
            return True
        symptom_rule = self._rules.get(symptom.code)
        if symptom_rule is not None and symptom_rule.is_local and symptom.layer is not None:
            return cause.layer == symptom.layer
        if isinstance(symptom_rule, ExplainedRule):
            if not self._has_done_harm(rule, cause.layer):
                return False
        elif None not in (cause.step, symptom.step) and cause.step != symptom.step:
            # In training a fault reaches all layers with the next step, through the weights.
            return True
        here, there = self._position(symptom.layer), self._position(cause.layer)
        return here is None or there is None or there <= here

    def _has_harmed(self, rule: Rule, layer: str) -> bool:
        return layer not in self._layers or rule.has_done_harm(self._layers[layer])

    def _position(self, layer: str | None) -> int | None:
        """Return the place of a layer in the order of calls; None for the model, or if unknown."""
        return self._layers[layer].position if layer in self._layers else None

    def _moment(self, finding: Finding) -> int | None:
        """Return the step of a finding; for the model, that of the newest evaluation."""
        is_of_model = finding.layer is None and finding.step is None
        return self._newest_evaluation if is_of_model else finding.step


class Announcements:
    """Remembers the findings of a training and its resumptions: steps, and which were announced.

    Args:
        records: Findings of the training that this one resumes, as in :attr:`records`.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self._first_steps: dict[_Place, int] = {}
        self._announced: set[_Key] = set()
        self._past: dict[tuple[str, str, str | None], PastFinding] = {}
        self._remember(records)

    def _remember(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            past = PastFinding(**record)
            self._past[past.code, past.severity, past.layer] = past

    @property
    def records(self) -> list[dict[str, Any]]:
        """The recorded findings, as plain data for a checkpoint."""
        return list(map(dataclasses.asdict, self._past.values()))

    def over(self, findings: Iterable[Finding]) -> tuple[PastFinding, ...]:
        """Return the recorded findings that are over, given the present ones."""
        present = {(f.code, f.layer) for f in findings if f.severity > Severity.INFO}
        return tuple(p for p in self._past.values() if (p.code, p.layer) not in present)

    def note(self, findings: Iterable[Finding], step: int) -> None:
        """Record the warnings and errors of a step, with the first and last step of each."""
        for finding in findings:
            if finding.severity is Severity.INFO:
                continue
            key = (finding.code, str(finding.severity), finding.layer)
            first = step if finding.step is None else finding.step
            self._past[key] = PastFinding(
                code=finding.code,
                name=finding.name,
                severity=str(finding.severity),
                layer=finding.layer,
                message=finding.message,
                evidence=str(finding.evidence),
                first_step=min(first, self._past[key].first_step) if key in self._past else first,
                last_step=max(first, step),
            )

    def date(self, findings: Iterable[Finding], step: int) -> tuple[Finding, ...]:
        """Return the findings of this step, each with the first step since which it holds.

        It counts from ``info`` on; a finding that was gone begins again.
        """
        findings = tuple(findings)
        first_steps: dict[_Place, int] = {}
        for finding in findings:
            place = (finding.code, finding.layer)
            seen = step if finding.step is None else finding.step
            first_steps[place] = min(seen, self._first_steps.get(place, seen))
        self._first_steps = first_steps
        return tuple(
            dataclasses.replace(finding, step=first_steps[finding.code, finding.layer])
            for finding in findings
        )

    def new(self, findings: Iterable[Finding]) -> tuple[FindingGroup, ...]:
        """Return the warnings and errors that were not announced yet."""
        new = [
            finding
            for finding in findings
            if finding.severity > Severity.INFO and finding.key not in self._announced
        ]
        self._announced.update(finding.key for finding in new)
        return group_findings(new)

    def state(self) -> list[dict[str, Any]]:
        """Return what is remembered, as plain data for a checkpoint."""
        keys = {(code, Severity.INFO, layer) for code, layer in self._first_steps}
        return [
            {
                "key": [code, int(severity), layer],
                "step": self._first_steps.get((code, layer)),
                "is_announced": severity > Severity.INFO,
            }
            for code, severity, layer in sorted(keys | self._announced, key=str)
        ]

    def resume(self, state: Iterable[dict[str, Any]], records: Iterable[Mapping[str, Any]]) -> None:
        """Go on from a :meth:`state`; errors are announced again, so that they can stop the run."""
        self._remember(records)
        for record in state:
            code, severity, layer = record["key"]
            if record["step"] is not None:
                self._first_steps[code, layer] = record["step"]
            if record["is_announced"] and severity < Severity.ERROR:
                self._announced.add((code, Severity(severity), layer))


@dataclass(frozen=True)
class _Symptom:
    """A finding to explain: its rule, layer (None: the model) and step."""

    code: str
    layer: str | None
    step: int | None
    cause: str | None = None


def _names_a_symptom(rule: Rule) -> bool:
    return isinstance(rule, ExplainedRule)


def _results(
    rule: Rule, history: History, explanations: Callable[[], Explanations]
) -> Iterator[Finding | Skipped]:
    if isinstance(rule, ExplainedRule):
        root = partial(explanations().root, rule.code)
        yield from _guard(rule, None, partial(rule.check_because, history, root))
    elif isinstance(rule, ModelRule):
        yield from _guard(rule, None, partial(rule.check_model, history))
    else:
        for layer in history.layers:
            yield from _guard(rule, layer.name, partial(rule.check, layer))


def _guard(
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
    """Set the cause of each finding that has one, and sort each root before its consequences."""
    chains = [explanations.chain(finding) for finding in findings]
    worst: dict[str, Severity] = {}
    for root, *_, finding in ([chain[0], *chain] for chain in chains):
        worst[root.code] = max(worst.get(root.code, Severity.INFO), finding.severity)

    def place(chain: list[Finding]) -> tuple[int, str, int, int, str, tuple[float, float]]:
        finding = chain[-1]
        # An info never comes before a fault.
        is_info = finding.severity is Severity.INFO
        severity = finding.severity if is_info else worst[chain[0].code]
        root = chain[0].code
        return (-severity, root, len(chain), -finding.severity, finding.code, worst_first(finding))

    return [
        dataclasses.replace(chain[-1], cause=chain[-2].code if len(chain) > 1 else None)
        for chain in sorted(chains, key=place)
    ]
