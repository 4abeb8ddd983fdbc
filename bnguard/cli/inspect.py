"""``bnguard inspect``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Literal

import rich
from jsonargparse import ArgumentParser

from bnguard.checkpoint import find_checkpoints, read_checkpoint
from bnguard.errors import BNGuardError
from bnguard.findings import Severity
from bnguard.inspection import inspect_checkpoint
from bnguard.report import Report

_EXAMPLES = """
examples:
  bnguard inspect last.ckpt
  bnguard inspect checkpoints/ --fail-on warning --json
"""


def run(arguments: list[str]) -> int:
    """Report on each checkpoint; what is unusable among them does not hide the rest."""
    parser = ArgumentParser(
        "bnguard inspect",
        description="Tell what is wrong with the BN layers of checkpoints; needs no model code, "
        "and runs nothing that a checkpoint holds.",
        epilog=_EXAMPLES,
        exit_on_error=False,
    )
    parser.add_argument("paths", type=str, nargs="+", help="checkpoints, folders of them or globs")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--fail-on",
        type=Literal["error", "warning", "never"],
        default="error",
        help="exit with status 1 where there is a finding so severe",
    )
    values = parser.parse_args(arguments)

    reports: dict[str, Report] = {}
    is_unusable = False
    for path in find_checkpoints(values.paths):
        try:
            reports[str(path)] = _report(path)
        except BNGuardError as error:
            is_unusable = True
            print(f"bnguard: error: {error}", file=sys.stderr)
    if values.json:
        print(json.dumps({path: report.to_dict() for path, report in reports.items()}, indent=2))
    else:
        for name, report in reports.items():
            rich.print(name, report)
    return 2 if is_unusable else int(_is_at_level(reports, values.fail_on))


def _report(path: Path) -> Report:
    return inspect_checkpoint(read_checkpoint(path))


def _is_at_level(reports: dict[str, Report], fail_on: str) -> bool:
    if fail_on == "never":
        return False
    level = Severity[fail_on.upper()]
    return any((report.worst_severity or 0) >= level for report in reports.values())
