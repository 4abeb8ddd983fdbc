"""What was found so far in a training: since which step, and what of it was announced."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from bnguard.findings import Finding, FindingGroup, Severity, group_findings

_Key = tuple[str, Severity, str | None]


class Announcements:
    """Remembers findings, by their keys, over the checks of a training and of its resumptions."""

    def __init__(self) -> None:
        self._first_steps: dict[_Key, int] = {}
        self._announced: set[_Key] = set()

    def dated(self, finding: Finding, step: int) -> Finding:
        """Return a finding of this step, dated to the step at which it first showed."""
        first = self._first_steps.setdefault(finding.key, step)
        return dataclasses.replace(finding, step=first) if finding.step is None else finding

    def new(self, findings: Iterable[Finding]) -> tuple[FindingGroup, ...]:
        """Return what is to be announced: each of the findings once, but what is only info."""
        new = [
            finding
            for finding in findings
            if finding.severity > Severity.INFO and finding.key not in self._announced
        ]
        self._announced.update(finding.key for finding in new)
        return group_findings(new)

    def state(self) -> list[dict[str, Any]]:
        """Return what is remembered, as a checkpoint can hold it."""
        return [
            {
                "key": [code, int(severity), layer],
                "step": step,
                "is_announced": key in self._announced,
            }
            for key, step in self._first_steps.items()
            for code, severity, layer in [key]
        ]

    def resume(self, state: Iterable[dict[str, Any]]) -> None:
        """Go on from where :meth:`state` was taken; errors are announced anew.

        A run that goes on from what is broken is told so, and stopped if it is to be.
        """
        for record in state:
            code, severity, layer = record["key"]
            key = (code, Severity(severity), layer)
            self._first_steps[key] = record["step"]
            if record["is_announced"] and severity < Severity.ERROR:
                self._announced.add(key)
