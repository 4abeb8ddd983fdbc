"""Which findings bring about which: a cause is named only where it can have made the symptom.

What goes wrong at a layer arrives at those that are called after it, and never at those before; it
does nothing before it has happened; and statistics that are said to be off, but fit what arrived,
have done no harm.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

from bnguard.findings import Finding, Severity, group_findings
from bnguard.observe.history import History, LayerHistory
from bnguard.rules import ExplainedRule, Rule


@dataclass(frozen=True)
class _Symptom:
    """What is to be explained: a rule's finding at a layer (None: the model), in some step."""

    code: str
    layer: str | None
    step: int | None
    cause: str | None = None


class Explanations:
    """The causes among the findings of a history.

    Args:
        history: What was observed.
        rules: The rules that ran.
        findings: What they found; what is only good to know explains nothing.
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
        self._by_code = {
            code: tuple(finding for group in group_findings(own) for finding in group.findings)
            for code in {finding.code for finding in accused}
            for own in [[finding for finding in accused if finding.code == code]]
        }

    def chain(self, finding: Finding) -> list[Finding]:
        """Return what explains a finding, the root cause first, and the finding itself last."""
        symptom = _Symptom(finding.code, finding.layer, self._moment(finding), finding.cause)
        return [*self._causes(symptom), finding]

    def root(self, code: str, layer: LayerHistory | None) -> Finding | None:
        """Return the root cause of what a rule is about to find in the newest evaluation.

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

        Of several that is one that explains no other of them, so that a chain is told in full; of
        several such the one with the highest code, since what was measured in evaluation, or is
        not finite, knows more of a symptom than a setting does.
        """
        if symptom.cause in self._by_code:
            # A rule that measured its cause knows better.
            return self._by_code[symptom.cause][0]
        found: dict[str, Finding] = {}
        for code, findings in self._by_code.items():
            rule = self._rules[code]
            if symptom.code in rule.explains:
                # The one at the layer itself goes before the worst of all.
                ordered = sorted(findings, key=lambda finding: finding.layer != symptom.layer)
                cause = next((f for f in ordered if self._can_make(rule, f, symptom)), None)
                if cause is not None:
                    found[code] = cause
        nearest = [c for c in found if not set(self._rules[c].explains) & (found.keys() - {c})]
        return found[max(nearest or found)] if found else None

    def _can_make(self, rule: Rule, cause: Finding, symptom: _Symptom) -> bool:
        """Return whether a cause can have made a symptom: by its place, its step, and its doing."""
        if cause.step is not None and symptom.step is not None and cause.step > symptom.step:
            return False
        if cause.layer is None:
            return True
        told_by = self._rules.get(symptom.code)
        if told_by is not None and told_by.is_local and symptom.layer is not None:
            return cause.layer == symptom.layer
        if isinstance(told_by, ExplainedRule):
            if not self._has_done_harm(rule, cause.layer):
                return False
        elif None not in (cause.step, symptom.step) and cause.step != symptom.step:
            # In training what has gone wrong reaches all layers with the next step, by the weights.
            return True
        here, there = self._position(symptom.layer), self._position(cause.layer)
        return here is None or there is None or there <= here

    def _has_harmed(self, rule: Rule, layer: str) -> bool:
        return layer not in self._layers or rule.has_done_harm(self._layers[layer])

    def _position(self, layer: str | None) -> int | None:
        """Return the place of a layer in the order of calls; None for the model, or not known."""
        return self._layers[layer].position if layer in self._layers else None

    def _moment(self, finding: Finding) -> int | None:
        """Return the step of a finding; what is told of the model is of the newest evaluation."""
        is_of_model = finding.layer is None and finding.step is None
        return self._newest_evaluation if is_of_model else finding.step
