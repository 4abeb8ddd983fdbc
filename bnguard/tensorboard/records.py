"""Findings in an event file: plain records, normalised when written and when read.

A record has the keys of ``Finding.to_dict`` that the tab shows: ``code``, ``name``, ``severity``,
``layer``, ``channels``, ``step``, ``message``, ``evidence``, ``fix`` and ``cause`` (code of the
finding that explains this one; empty for a root cause). The fix has a ``command`` too, and
``layers`` names several layers.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bnguard.findings import Evidence
from bnguard.report.json_document import json_float

Record = dict[str, Any]

_SEVERITIES = ("info", "warning", "error")
# Placeholders for the model and its data in a command.
SUBJECTS = "--model PACKAGE.CLASS --data PACKAGE.CLASS"
_COMMANDS = ("recalibrate", "swap")
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
        "layers": [_text(name) for name in _items(raw.get("layers"))],
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
            "command": _text(fix.get("command")) or repair_command(fix.get("repair")),
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


def group_causes(records: Sequence[Record]) -> list[dict[str, list[int]]]:
    """Return the places of each root cause's findings and of what they explain.

    Findings of one rule and severity are one cause: errors before warnings, the worst layer first.

    >>> codes = [("BN302", "BN301"), ("BN301", "BN303"), ("BN303", None)]
    >>> group_causes([finding_record({"code": code, "cause": cause}) for code, cause in codes])
    [{'roots': [2], 'effects': [0, 1]}]
    """
    codes = {record["code"] for record in records}
    causes = {r["code"]: r["cause"] for r in reversed(records) if r["cause"] in codes}
    root_codes = {record["code"] for record in records if record["cause"] not in codes}
    groups: dict[tuple[str, str], dict[str, list[int]]] = {}
    effects = []
    for place, record in enumerate(records):
        code = record["cause"]
        for _ in codes:
            code = code if code in root_codes else causes.get(code, "")
        if code in root_codes:
            effects.append((code, place))
        else:
            key = (record["code"], record["severity"])
            groups.setdefault(key, {"roots": [], "effects": []})["roots"].append(place)
    for code, place in effects:
        next(group for (root, _), group in groups.items() if root == code)["effects"].append(place)
    for group in groups.values():
        group["roots"].sort(key=lambda place: excess(records[place]), reverse=True)
    return [groups[key] for key in sorted(groups, key=lambda key: -_SEVERITIES.index(key[1]))]


def excess(record: Record) -> float:
    """Return the evidence relative to its limit; 0 if unknown."""
    evidence = record["evidence"]
    value, limit = evidence["value"], evidence["limit"]
    if value in ("NaN", "Infinity"):
        return math.inf
    if not (isinstance(value, float) and isinstance(limit, float)):
        return 0.0
    return Evidence("", value, limit, is_minimum=evidence["is_minimum"]).excess


def repair_command(repair: object, subjects: str = SUBJECTS, checkpoint: str = "CKPT") -> str:
    """Return the command that repairs a checkpoint; empty if there is none.

    >>> repair_command("swap", "--model my.Net --data my.Data")
    'bnguard swap CKPT --model my.Net --data my.Data'
    """
    return f"bnguard {repair} {shlex.quote(checkpoint)} {subjects}" if repair in _COMMANDS else ""


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
