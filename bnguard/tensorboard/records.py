"""Findings in an event file: plain records, normalised when written and when read.

A record has the keys of ``Finding.to_dict`` that the tab shows: ``code``, ``name``, ``severity``,
``layer``, ``channels``, ``step``, ``message``, ``evidence``, ``fix`` and ``cause`` (code of the
finding that explains this one; empty for a root cause). The fix has a ``command`` too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from bnguard.errors import printable
from bnguard.findings import (
    Evidence,
    Finding,
    FindingGroup,
    Fix,
    Severity,
    by_root_cause,
    group_findings,
)
from bnguard.report.json_document import json_float

Record = dict[str, Any]

_SEVERITIES = tuple(map(str, Severity))
_LONGEST_TEXT = 2_000
_MOST_RECORDS = 10_000
_MOST_ITEMS = 4_096


def finding_record(raw: Mapping[str, Any]) -> Record:
    """Return a finding, as from ``Finding.to_dict``, with all keys and values of the right type.

    Values of the wrong type become empty, because a finding shown badly is better than none.

    >>> record = finding_record({"code": "BN301", "evidence": {"measure": "shift", "value": 2.5}})
    >>> record["severity"], record["evidence"]["measure"], record["evidence"]["is_minimum"]
    ('info', 'shift', False)
    """
    evidence, fix = _mapping(raw.get("evidence")), _mapping(raw.get("fix"))
    layer = raw.get("layer")
    severity = _text(raw.get("severity")).lower()
    return {
        "code": _text(raw.get("code")),
        "name": _text(raw.get("name")),
        "severity": severity if severity in _SEVERITIES else "info",
        "layer": None if layer is None else _text(layer),
        "channels": [item for item in _items(raw.get("channels")) if _is_index(item)],
        "step": _step(raw.get("step")),
        "message": _text(raw.get("message")),
        "evidence": {
            "measure": _text(evidence.get("measure")),
            "value": json_number(evidence.get("value")),
            "limit": json_number(evidence.get("limit")),
            "unit": _text(evidence.get("unit")),
            "is_minimum": evidence.get("is_minimum") is True,
        },
        "fix": {
            "summary": _text(fix.get("summary")),
            "command": _text(fix.get("command")) or Fix("", _text(fix.get("repair"))).command(),
        },
        "cause": _text(raw.get("cause")),
    }


def encode_findings(findings: Iterable[Mapping[str, Any]]) -> bytes:
    """Return findings as a JSON list of records."""
    return json.dumps([finding_record(finding) for finding in findings]).encode()


def decode_findings(text: bytes) -> list[Record]:
    """Return the records of a JSON list from an untrusted file.

    Raises:
        ValueError: It is not a JSON list.

    Example:
        >>> decode_findings(encode_findings([{"code": "BN301"}]))[0]["code"]
        'BN301'
    """
    try:
        raw = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(raw, list):
        raise ValueError("not a list")
    return [finding_record(item) for item in raw[:_MOST_RECORDS] if isinstance(item, dict)]


def as_findings(records: Iterable[Record]) -> list[Finding]:
    """Return records as findings, in which nothing can control a terminal.

    What is unknown is NaN in the evidence; a cause that is not among the records is left out. The
    repair of a fix is the whole command.
    """
    records = list(records)
    codes = {record["code"] for record in records}
    return [
        Finding(
            code=printable(record["code"]),
            name=printable(record["name"]),
            severity=Severity[record["severity"].upper()],
            layer=None if record["layer"] is None else printable(record["layer"]),
            message=printable(record["message"]),
            evidence=_evidence(record["evidence"]),
            fix=Fix(printable(record["fix"]["summary"]), printable(record["fix"]["command"])),
            step=record["step"],
            cause=printable(record["cause"]) if record["cause"] in codes else None,
        )
        for record in records
    ]


def _evidence(evidence: Mapping[str, Any]) -> Evidence:
    value, limit = (
        math.nan if evidence[key] is None else float(evidence[key]) for key in ("value", "limit")
    )
    measure, unit = printable(evidence["measure"]), printable(evidence["unit"])
    return Evidence(measure, value, limit, unit, evidence["is_minimum"])


def group_causes(findings: Iterable[Finding]) -> dict[FindingGroup, list[FindingGroup]]:
    """Return each root cause with what it leads to, errors before warnings."""
    causes = by_root_cause(group_findings(findings))
    return dict(sorted(causes.items(), key=lambda cause: -cause[0].worst.severity))


def _text(value: object) -> str:
    if value is None:
        return ""
    text = str(value) if isinstance(value, (str, int, float)) else ""
    return text[:_LONGEST_TEXT]


def json_number(value: object) -> float | str | None:
    """Return a number for JSON, as a word if it is not finite; None if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return json_float(number)


def _step(value: object) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return int(value) if abs(value) < 2**53 else None


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _items(value: object) -> list[Any]:
    return list(value[:_MOST_ITEMS]) if isinstance(value, (list, tuple)) else []


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
