"""Recalibrations as rich draws them, and the progress bar while they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from bnguard.fixes.recalibration import LayerChange, Recalibration
    from bnguard.fixes.selection import SkippedLayer

_MOST_LAYERS_SHOWN = 10


def recalibration_view(recalibration: Recalibration) -> RenderableType:
    """Return a heading, the layers that moved furthest, those that were skipped, and the score."""
    parts: list[RenderableType] = [_heading(recalibration)]
    if recalibration.layers:
        parts.append(_layers_view(recalibration.layers))
    if recalibration.skipped:
        parts.append(_skipped_view(recalibration.skipped))
    if recalibration.score_before is not None and recalibration.score_after is not None:
        before, after = recalibration.score_before, recalibration.score_after
        parts.append(Text(f"score {before:.4g} → {after:.4g}"))
    parts += [Text(note) for note in recalibration.notes]
    return Group(*parts)


def _heading(recalibration: Recalibration) -> Text:
    parts = [
        f"recalibrated ({recalibration.method})" if recalibration.is_kept else "taken back",
        _counted(len(recalibration.layers), "BN layer"),
        _counted(recalibration.samples, "sample"),
        _counted(recalibration.batches, "batch", "batches"),
    ]
    return Text(" · ".join(parts), style="bold" if recalibration.is_kept else "bold yellow")


def _layers_view(layers: tuple[LayerChange, ...]) -> RenderableType:
    shown = sorted(layers, key=lambda layer: layer.distance, reverse=True)[:_MOST_LAYERS_SHOWN]
    title = "Statistics after against before, the largest moves first"
    table = Table(title=title, title_justify="left", title_style="", box=None, pad_edge=False)
    table.add_column("layer", overflow="fold")
    for heading in ("n", "shift, σ", "log var ratio"):
        table.add_column(heading, justify="right")
    for layer in shown:
        table.add_row(
            layer.name,
            f"{layer.values:,}",
            _moved(layer.max_shift_std),
            _moved(layer.extreme_log_variance_ratio),
        )
    rest = len(layers) - len(shown)
    if not rest:
        return table
    return Group(table, Text(f"and {_counted(rest, 'more layer')}", style="dim"))


def _skipped_view(skipped: tuple[SkippedLayer, ...]) -> RenderableType:
    table = Table.grid(padding=(0, 2, 0, 0))
    for layer in skipped:
        table.add_row(Text("skipped", style="yellow"), layer.name, layer.reason)
    return table


def _moved(value: float | None) -> str:
    return "was not finite" if value is None else f"{value:.3g}"


def _counted(number: int, one: str, many: str | None = None) -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"
