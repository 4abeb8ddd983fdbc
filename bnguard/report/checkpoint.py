"""Inspected checkpoints, as rich draws them and as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bnguard.report.json_document import SCHEMA
from bnguard.version import __version__

if TYPE_CHECKING:
    from bnguard.checkpoint import Checkpoint, CheckpointLayer
    from bnguard.checkpoint.model import NotedFinding
    from bnguard.report import Report


def checkpoint_view(checkpoint: Checkpoint, report: Report, *, is_verbose: bool) -> RenderableType:
    """Return what an inspection found: the file, its findings, and each layer if asked for."""
    parts: list[RenderableType] = [Text(f"{checkpoint.path} ({checkpoint.format})"), report]
    found = {finding.code for finding in report.findings}
    only_reported = [noted for noted in checkpoint.reported if noted.code not in found]
    parts += [Text(line) for line in _reported_lines(only_reported)]
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
    """Return the inspection of several checkpoints as plain data.

    Schema version 1: ``schema``, ``bnguard``, ``checkpoints`` and ``errors`` (each with ``path``
    and ``message``). A checkpoint has ``path``, ``format``, ``models`` (their names),
    ``global_step``, ``epoch``, ``provenance`` (null where bnguard did not write it), ``problems``
    (sentences), ``reported`` (what ``BatchNormMonitor`` reported of the training, each with
    ``code``, ``name``, ``severity``, ``layer``, ``message``, ``evidence``, ``first_step``,
    ``last_step``), and ``report``, as :mod:`bnguard.report.json_document` describes it.
    """
    return {
        "schema": SCHEMA,
        "bnguard": __version__,
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


def _reported_lines(reported: Iterable[NotedFinding]) -> Iterator[str]:
    """Yield what the callback reported while the checkpoint was trained, a line each rule."""
    groups: dict[tuple[str, str], list[NotedFinding]] = {}
    for noted in reported:
        groups.setdefault((noted.severity, noted.code), []).append(noted)
    for (severity, code), group in groups.items():
        first, last = min(n.first_step for n in group), max(n.last_step for n in group)
        when = f"at step {first}" if first == last else f"at steps {first} to {last}"
        noted = group[0]
        place = "the model" if noted.layer is None else noted.layer or "the model itself"
        where = place if len(group) == 1 else f"{len(group)} layers, {place} among them"
        yield (
            f"while training, bnguard reported: {severity} {code} {noted.name} {when}, {where}: "
            f"{noted.message}; {noted.evidence}"
        )


def _layers_view(layers: Iterable[CheckpointLayer]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("layer", overflow="fold")
    for heading in ("C", "updates", "|mean| max", "var min", "var max", "dtype"):
        table.add_column(heading, justify="right")
    for layer in layers:
        table.add_row(
            Text(layer.name),
            str(layer.channels),
            "–" if layer.counter is None else f"{layer.counter:,}",
            f"{np.max(np.abs(layer.running_mean), initial=0.0):.3g}",
            f"{np.min(layer.running_var, initial=np.inf):.3g}",
            f"{np.max(layer.running_var, initial=0.0):.3g}",
            layer.dtype,
        )
    return table
