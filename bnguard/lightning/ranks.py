"""Findings of several processes, brought together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np
import torch.distributed as dist

from bnguard.diagnosis import diagnose
from bnguard.findings import Finding
from bnguard.history import History, LayerHistory
from bnguard.report import Report
from bnguard.rules import Rule
from bnguard.stats import shift_std

T = TypeVar("T")


def number_of_ranks() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(mine: T) -> list[T]:
    """Return what each rank brings, in the order of the ranks.

    A collective: every rank must come here as often as the others.
    """
    if number_of_ranks() == 1:
        return [mine]
    everybodys: list[T | None] = [None] * number_of_ranks()
    dist.all_gather_object(everybodys, mine)
    return everybodys  # type: ignore[return-value]


def merge_findings(by_rank: Sequence[Iterable[Finding]]) -> tuple[Finding, ...]:
    """Return the findings of all ranks, each once, in the words of the first rank that has it.

    One that not all ranks have says which do.
    """
    holders: dict[object, list[int]] = {}
    first: dict[object, Finding] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings:
            holders.setdefault(finding.key, []).append(rank)
            first.setdefault(finding.key, finding)
    return tuple(_labelled(finding, holders[key], len(by_rank)) for key, finding in first.items())


def merge_reports(by_rank: Sequence[Report | None], rules: Iterable[Rule]) -> Report | None:
    """Return the report of rank zero, with what the other ranks found; None where it has none.

    The running statistics are those of rank zero; how far the others' are from them is judged, too.
    """
    own = by_rank[0]
    if own is None or len(by_rank) == 1:
        return own
    others = [report for report in by_rank[1:] if report is not None]
    history = _compared(own.history, [report.history for report in others])
    compared = diagnose(history, rules).findings
    known = {finding.key for finding in own.findings}
    between_ranks = [finding for finding in compared if finding.key not in known]
    merged = merge_findings([() if report is None else report.findings for report in by_rank])
    findings = sorted((*merged, *between_ranks), key=lambda finding: -finding.severity)
    return Report(history, tuple(findings), own.skipped)


def _labelled(finding: Finding, ranks: Sequence[int], size: int) -> Finding:
    if len(ranks) == size:
        return finding
    where = ", ".join(map(str, ranks))
    label = f"on rank {where}" if len(ranks) == 1 else f"on ranks {where}"
    return dataclasses.replace(finding, message=f"{label}: {finding.message}")


def _compared(history: History, others: Sequence[History]) -> History:
    """Return a history in which each layer knows how far the other ranks' statistics are."""
    theirs = [{layer.name: layer for layer in other.layers} for other in others]
    layers = (
        _distanced(layer, [by_name[layer.name] for by_name in theirs if layer.name in by_name])
        for layer in history.layers
    )
    return dataclasses.replace(history, layers=tuple(layers))


def _distanced(layer: LayerHistory, others: Sequence[LayerHistory]) -> LayerHistory:
    running = layer.running
    shifts = [
        np.abs(shift_std(other.running.mean, running.mean, running.var, layer.eps))
        for other in others
        if running is not None
        and other.running is not None
        and other.running.mean.shape == running.mean.shape
    ]
    if not shifts:
        return layer
    return dataclasses.replace(layer, rank_shift_std=np.max(shifts, axis=0))
