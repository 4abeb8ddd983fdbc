"""Findings as rows of a table, a finding each."""

from __future__ import annotations

from collections.abc import Iterable

from bnguard.findings import Finding

COLUMNS = ("step", "code", "name", "severity", "layer", "message", "evidence", "fix")


def rows_of(findings: Iterable[Finding]) -> list[list[str]]:
    """Return a row of text for each finding, in the order of ``COLUMNS``."""
    return [
        [
            "" if finding.step is None else str(finding.step),
            finding.code,
            finding.name,
            str(finding.severity),
            "the model" if finding.layer is None else finding.layer,
            finding.message,
            str(finding.evidence),
            finding.fix.summary,
        ]
        for finding in findings
    ]
