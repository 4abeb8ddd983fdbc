"""``bnguard inspect``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jsonargparse import ArgumentParser
from rich.console import Group, RenderableType
from rich.text import Text

from bnguard.checkpoint import Checkpoint, find_checkpoints, read_checkpoint
from bnguard.cli.output import (
    add_json_option,
    command_parser,
    print_error,
    show,
    show_json,
)
from bnguard.configuration import read_configuration
from bnguard.errors import BNGuardError, NoBatchNormError
from bnguard.findings import Severity
from bnguard.inspection import inspect_checkpoint
from bnguard.layers.names import layer_label
from bnguard.report import Report
from bnguard.report.json_document import add_version
from bnguard.report.terminal import by_rule, layer_table

if TYPE_CHECKING:
    from bnguard.checkpoint import CheckpointLayer
    from bnguard.findings import PastFinding

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
  0: nothing at the level of --fail-on; 1: findings at it; 2: unusable input

examples:
  bnguard inspect last.ckpt
  bnguard inspect checkpoints/ --fail-on warning --json
"""


def run(arguments: list[str]) -> int:
    """Report on each checkpoint; an unusable one does not hide the rest."""
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
            if values.weights is not None:
                checkpoint = checkpoint.only(values.weights)
            inspected.append((checkpoint, inspect_checkpoint(checkpoint, configuration)))
        except NoBatchNormError as error:
            # Folders hold optimizer states and counters next to the model.
            (errors if path in named else passed_over)[str(path)] = str(error)
        except BNGuardError as error:
            errors[str(path)] = str(error)
    if not inspected:
        errors |= passed_over
        passed_over = {}
    if values.json:
        show_json(inspection_document(inspected, errors))
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
        "Find problems of the BN layers in checkpoints; needs no model code, "
        "and runs nothing that a checkpoint holds.",
        _HELP,
    )
    parser.add_argument("paths", type=str, nargs="+", help="checkpoints, folders of them or globs")
    parser.add_argument("--select", type=str, help="run only these rules: BN3,BN402")
    parser.add_argument("--ignore", type=str, help="leave these rules out: BN303")
    parser.add_argument(
        "--weights",
        type=str,
        help="inspect this model alone, or this part of one: ema, state_dict.encoder_q",
    )
    parser.add_argument("--verbose", action="store_true", help="show a line a layer")
    add_json_option(parser)
    parser.add_argument(
        "--fail-on",
        type=Literal["error", "warning", "never"],
        default="error",
        help="exit with status 1 if a finding is at least this severe",
    )
    return parser


def checkpoint_view(checkpoint: Checkpoint, report: Report, *, is_verbose: bool) -> RenderableType:
    """Return what to print of an inspection: the file, its findings, and each layer if verbose."""
    parts: list[RenderableType] = [Text(f"{checkpoint.path} ({checkpoint.format})"), report]
    found = {finding.code for finding in report.findings}
    only_reported = [noted for noted in checkpoint.reported if noted.code not in found]
    parts += [Text(line) for line in _list_reported(only_reported)]
    parts += [Text(f"unusable: {problem}", style="yellow") for problem in checkpoint.problems]
    if checkpoint.provenance is not None:
        action = checkpoint.provenance.get("action", "written")
        parts.append(Text(f"written by bnguard: {action}", style="dim"))
    if is_verbose:
        has_several = len(checkpoint.models) > 1
        for model in checkpoint.models:
            parts += [Text(model.name, style="bold")] if has_several else []
            parts.append(_layers_view(model.layers))
    return Group(*parts)


def inspection_document(
    inspected: Iterable[tuple[Checkpoint, Report]], errors: Mapping[str, str]
) -> dict[str, Any]:
    """Return the inspection of several checkpoints as plain data, as the help describes it."""
    content = {
        "checkpoints": [
            {
                "path": str(checkpoint.path),
                "format": checkpoint.format,
                "models": [model.name for model in checkpoint.models],
                "global_step": checkpoint.global_step,
                "epoch": checkpoint.epoch,
                "provenance": checkpoint.provenance,
                "problems": list(checkpoint.problems),
                "reported": [dataclasses.asdict(noted) for noted in checkpoint.reported],
                "report": report.to_dict(),
            }
            for checkpoint, report in inspected
        ],
        "errors": [{"path": path, "message": message} for path, message in errors.items()],
    }
    return add_version(content)


def _list_reported(reported: Iterable[PastFinding]) -> Iterator[str]:
    """Yield what the callback reported while the checkpoint was trained, a line each rule."""
    for noted, layers, steps in by_rule(reported):
        place = layer_label(noted.layer)
        where = place if layers == 1 else f"{layers} layers, {place} among them"
        yield (
            f"while training, bnguard reported: {noted.severity} {noted.code} {noted.name} at "
            f"{steps}, {where}: {noted.message}; {noted.evidence}"
        )


def _layers_view(layers: Iterable[CheckpointLayer]) -> RenderableType:
    headings = ("layer", "C", "updates", "|mean| max", "var min", "var max", "dtype")
    rows = (
        (
            layer.name,
            str(layer.channels),
            "–" if layer.counter is None else f"{layer.counter:,}",
            f"{np.max(np.abs(layer.running_mean), initial=0.0):.3g}",
            f"{np.min(layer.running_var, initial=np.inf):.3g}",
            f"{np.max(layer.running_var, initial=0.0):.3g}",
            layer.dtype,
        )
        for layer in layers
    )
    return layer_table(headings, rows)


def _codes(given: str | None) -> list[str] | None:
    return None if given is None else [code.strip() for code in given.split(",")]


def _is_at_level(reports: list[Report], fail_on: str) -> bool:
    if fail_on == "never":
        return False
    level = Severity[fail_on.upper()]
    return any((report.worst_severity or 0) >= level for report in reports)
