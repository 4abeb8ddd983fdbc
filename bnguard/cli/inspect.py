"""``bnguard inspect``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from bnguard.checkpoint import Checkpoint, find_checkpoints, read_checkpoint
from bnguard.cli.output import command_parser, print_error
from bnguard.cli.showing import show, show_document
from bnguard.configuration import read_configuration
from bnguard.errors import BNGuardError, NoBatchNormError
from bnguard.findings import Severity
from bnguard.inspection import inspect_checkpoint
from bnguard.report import Report
from bnguard.report.checkpoint import checkpoint_view, inspection_document

_HELP = """
--json prints one document:
  schema        version of this form: 1; keys may be added in a version
  bnguard       version of bnguard
  checkpoints   each with path, format, models, global_step, epoch, provenance,
                problems, reported (findings of the training, noted by
                BatchNormMonitor), and report: findings, layers, skipped, notes
  errors        what could not be read, each with path and message
  a finding has code, name, severity (info, warning, error), layer, message,
                evidence (measure, value, limit, unit, is_minimum), reasons,
                fix (summary, repair), channels, step, cause

exit status:
  0 nothing at the level of --fail-on, 1 findings at it, 2 unusable input

examples:
  bnguard inspect last.ckpt
  bnguard inspect checkpoints/ --fail-on warning --json
"""


def run(arguments: list[str]) -> int:
    """Report on each checkpoint; what is unusable among them does not hide the rest."""
    values = make_parser().parse_args(arguments)
    configuration = read_configuration().changed(
        select=_codes(values.select), ignore=_codes(values.ignore)
    )
    inspected: list[tuple[Checkpoint, Report]] = []
    errors: dict[str, str] = {}
    passed_over: dict[str, str] = {}
    named = {Path(path) for path in values.paths}
    for path in find_checkpoints(values.paths):
        try:
            checkpoint = read_checkpoint(path)
            inspected.append((checkpoint, inspect_checkpoint(checkpoint, configuration)))
        except NoBatchNormError as error:
            # Optimizer states and counters lie in folders beside the model; nobody asked for them.
            (errors if path in named else passed_over)[str(path)] = str(error)
        except BNGuardError as error:
            errors[str(path)] = str(error)
    if not inspected:
        errors |= passed_over
        passed_over = {}
    if values.json:
        show_document(inspection_document(inspected, errors))
    else:
        for checkpoint, report in inspected:
            show(checkpoint_view(checkpoint, report, is_verbose=values.verbose))
    for message in passed_over.values():
        print(f"bnguard: note: {message}", file=sys.stderr)
    for message in errors.values():
        print_error(message)
    if errors:
        return 2
    return int(_is_at_level([report for _, report in inspected], values.fail_on))


def make_parser() -> ArgumentParser:
    """Return the parser of the command."""
    parser = command_parser(
        "inspect",
        "Tell what is wrong with the BN layers of checkpoints; needs no model code, "
        "and runs nothing that a checkpoint holds.",
        _HELP,
    )
    parser.add_argument("paths", type=str, nargs="+", help="checkpoints, folders of them or globs")
    parser.add_argument("--select", type=str, help="run these rules alone: BN3,BN402")
    parser.add_argument("--ignore", type=str, help="leave these rules out: BN303")
    parser.add_argument("--verbose", action="store_true", help="show a line a layer")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument(
        "--fail-on",
        type=Literal["error", "warning", "never"],
        default="error",
        help="exit with status 1 where there is a finding so severe",
    )
    return parser


def _codes(given: str | None) -> list[str] | None:
    return None if given is None else [code.strip() for code in given.split(",")]


def _is_at_level(reports: list[Report], fail_on: str) -> bool:
    if fail_on == "never":
        return False
    level = Severity[fail_on.upper()]
    return any((report.worst_severity or 0) >= level for report in reports)
