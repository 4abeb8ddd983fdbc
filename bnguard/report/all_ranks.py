"""Merges the reports of the processes of one training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bnguard.distributed import Exchange
from bnguard.findings import Finding, Severity, by_root_cause, group_findings
from bnguard.layers.distances import FloatArray, shift_std
from bnguard.observe.history import History, LayerHistory, RunningStatistics
from bnguard.report import Report
from bnguard.rules import Rule
from bnguard.rules.engine import run_rules


def merge_reports(
    own: Report,
    exchange: Exchange,
    rules: Sequence[Rule],
    is_wanted: Callable[[Finding], bool],
) -> Report:
    """Return this rank's report with the findings of all ranks, each once and labelled.

    The running statistics are compare with those of rank zero. Every rank has to call this.
    """

    def merge(by_rank: Sequence[_Contribution | None]) -> _Merged:
        history, distances = own.history, _distances(own.history, by_rank)
        compare = run_rules(_with_distances(history, distances), rules, is_wanted).findings
        known = {finding.key for finding in own.findings}
        between_ranks = [finding for finding in compare if finding.key not in known]
        found = merge_findings([None if part is None else part.findings for part in by_rank])
        return _Merged(_worst_first((*found, *between_ranks)), distances)

    running = {layer.name: layer.running for layer in own.layers if layer.running is not None}
    merged = exchange.merge(_Contribution(own.findings, running), merge)
    # One more round: rank zero often holds the store, and may exit once it has its report.
    exchange.merge((), len)
    history = _with_distances(own.history, merged.distances)
    present = {(f.code, f.layer) for f in merged.findings if f.severity > Severity.INFO}
    over = tuple(past for past in own.over if (past.code, past.layer) not in present)
    return dataclasses.replace(own, history=history, findings=merged.findings, over=over)


def merge_findings(by_rank: Sequence[Iterable[Finding] | None]) -> tuple[Finding, ...]:
    """Return the findings of all ranks, each once, in the words of the first rank that has it.

    A finding that only some ranks have names them; None is a rank that has left.
    """
    holders: dict[object, list[int]] = {}
    first: dict[object, Finding] = {}
    for rank, findings in enumerate(by_rank):
        for finding in findings or ():
            holders.setdefault(finding.key, []).append(rank)
            first.setdefault(finding.key, finding)
    return tuple(_name_ranks(finding, holders[key], len(by_rank)) for key, finding in first.items())


@dataclass(frozen=True)
class _Contribution:
    """What one rank contributes."""

    findings: tuple[Finding, ...]
    running: Mapping[str, RunningStatistics]


@dataclass(frozen=True)
class _Merged:
    """The merged findings, and the distance between the ranks' running means by layer."""

    findings: tuple[Finding, ...]
    distances: Mapping[str, FloatArray]


def _name_ranks(finding: Finding, ranks: Sequence[int], size: int) -> Finding:
    if len(ranks) == size:
        return finding
    where = ", ".join(map(str, ranks))
    label = f"on rank {where}" if len(ranks) == 1 else f"on ranks {where}"
    return dataclasses.replace(finding, message=f"{label}: {finding.message}")


def _worst_first(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """Return the findings in the order of one rank's report.

    A root cause is as urgent as the worst finding that it explains; infos are last.
    """
    serious = [finding for finding in findings if finding.severity > Severity.INFO]
    causes = by_root_cause(group_findings(serious))
    blocks = [(root, *effects) for root, effects in causes.items()]
    blocks.sort(key=lambda block: max(group.worst.severity for group in block), reverse=True)
    infos = group_findings(finding for finding in findings if finding.severity is Severity.INFO)
    groups = [group for block in (*blocks, infos) for group in block]
    return tuple(finding for group in groups for finding in group.findings)


def _distances(history: History, by_rank: Sequence[_Contribution | None]) -> dict[str, FloatArray]:
    distances = {}
    for layer in history.layers:
        own = layer.running
        shifts = [
            np.abs(shift_std(other.mean, own.mean, own.var, layer.eps))
            for part in by_rank
            if part is not None
            and own is not None
            and (other := part.running.get(layer.name)) is not None
            and other.mean.shape == own.mean.shape
        ]
        # This rank's own is among them.
        if len(shifts) > 1:
            distances[layer.name] = np.max(shifts, axis=0)
    return distances


def _with_distances(history: History, distances: Mapping[str, FloatArray]) -> History:
    def compare(layer: LayerHistory) -> LayerHistory:
        return dataclasses.replace(layer, rank_shift_std=distances.get(layer.name))

    return dataclasses.replace(history, layers=tuple(map(compare, history.layers)))
