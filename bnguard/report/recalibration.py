"""Recalibrations as rich draws them: they fit 80 columns, and stay readable without colour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bnguard.report.lines import counted

if TYPE_CHECKING:
    from bnguard.observe.history import ModeGap
    from bnguard.recalibration.result import LayerChange, Recalibration
    from bnguard.recalibration.selection import SkippedLayer

_MOST_LAYERS_SHOWN = 10


def recalibration_view(recalibration: Recalibration) -> RenderableType:
    """Return a heading, the layers that moved furthest, those skipped, mode gap and score."""
    parts: list[RenderableType] = [_heading(recalibration), _layers_view(recalibration.layers)]
    if recalibration.skipped:
        parts.append(_skipped_view(recalibration.skipped))
    parts.append(_gap_view(recalibration.mode_gap_before, recalibration.mode_gap_after))
    if recalibration.score_before is not None and recalibration.score_after is not None:
        verdict = "kept" if recalibration.is_kept else "taken back"
        change = f"{recalibration.score_before:.4g} → {recalibration.score_after:.4g}"
        parts.append(Text(f"score {change}: {verdict}", style="bold"))
    parts += [Text(f"note: {note}") for note in recalibration.notes]
    return Group(*parts)


def _heading(recalibration: Recalibration) -> Text:
    parts = [
        "recalibrated" if recalibration.is_kept else "not recalibrated",
        recalibration.method,
        counted(len(recalibration.layers), "BN layer"),
        counted(recalibration.samples, "sample"),
        counted(recalibration.batches, "batch", "batches"),
    ]
    return Text(" · ".join(parts), style="bold" if recalibration.is_kept else "bold yellow")


def _layers_view(layers: Sequence[LayerChange]) -> RenderableType:
    shown = sorted(layers, key=lambda layer: layer.distance, reverse=True)[:_MOST_LAYERS_SHOWN]
    table = Table(box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in ("n", "shift, σ", "log var ratio"):
        table.add_column(heading, justify="right")
    for layer in shown:
        table.add_row(
            layer.name or "(the model)",
            f"{layer.values:,}",
            _moved(layer.max_shift_std),
            _moved(layer.extreme_log_variance_ratio),
        )
    parts: list[RenderableType] = [
        Text("How far the statistics moved, the furthest first", style="dim"),
        table,
    ]
    if rest := len(layers) - len(shown):
        parts.append(Text(f"and {counted(rest, 'more layer')}", style="dim"))
    return Group(*parts)


def _gap_view(before: ModeGap | str, after: ModeGap | str) -> RenderableType:
    if isinstance(after, str):
        return Text(f"mode gap not measured: {after}", style="dim")
    first = "?" if isinstance(before, str) else f"{before.relative_change:.3g}"
    change = f"{first} → {after.relative_change:.3g} σ of the outputs"
    noise = after.sampling_change
    alone = "" if noise is None else f" (sampling alone: {noise:.2g})"
    return Text(f"mode gap {change}{alone}, on {counted(after.samples, 'sample')}")


def _skipped_view(skipped: Sequence[SkippedLayer]) -> RenderableType:
    """Return what was skipped, the layers of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for layer in skipped:
        by_reason.setdefault(layer.reason, []).append(layer.name or "(the model)")
    lines = []
    for reason, names in by_reason.items():
        more = f" (and {len(names) - 1:,} more like it)" if len(names) > 1 else ""
        lines.append(f"skipped: {names[0]}{more} {reason}")
    return Text("\n".join(lines), style="yellow")


def _moved(value: float | None) -> str:
    return "was not finite" if value is None else f"{value:.3g}"
