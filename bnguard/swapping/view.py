"""Swaps as rich draws them, and the progress bar while the network learns."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bnguard.findings import counted

if TYPE_CHECKING:
    from bnguard.swapping.result import ReplacedLayer, Swap

# A network whose outputs stay further off, in standard deviations, has lost points of accuracy.
_FAR_OFF_STD = 0.25


def swap_view(swap: Swap) -> RenderableType:
    """Return a heading, what was replaced by what, what was left, and how far the outputs moved."""
    parts: list[RenderableType] = [_heading(swap), _replaced_view(swap.replaced)]
    parts += [Text(f"left  {layer.name} {layer.reason}") for layer in swap.skipped]
    parts.append(Text(_outputs(swap)))
    if swap.distillation is not None and swap.distillation.distance > _FAR_OFF_STD:
        parts.append(Text(f"still far off, so measure it before use: {_advice(swap)}"))
    parts += [Text(note) for note in swap.notes]
    return Group(*parts)


class DistillationBar:
    """A progress bar of a distillation, with the distance that is left; where there is a terminal.

    Args:
        steps: Steps at most.
    """

    def __init__(self, steps: int) -> None:
        self._progress = Progress(
            TextColumn("distilling"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps, {task.description}"),
            TimeRemainingColumn(),
            transient=True,
        )
        self._progress.disable = not self._progress.console.is_terminal
        self._task = self._progress.add_task("", total=steps)

    def start(self) -> None:
        """Show the bar."""
        self._progress.start()

    def advance(self, step: int, distance: float) -> None:
        """Move the bar, and show how far the outputs are from the teacher's."""
        self._progress.update(self._task, completed=step, description=f"{distance:.3g} σ off")

    def stop(self) -> None:
        """Take the bar away."""
        self._progress.stop()


def _heading(swap: Swap) -> Text:
    parts = [f"swapped ({swap.to})", counted(len(swap.replaced), "BN layer")]
    if swap.skipped:
        parts.append(f"{len(swap.skipped)} left")
    if swap.distillation is not None:
        parts.append(counted(swap.distillation.steps, "step"))
    return Text(" · ".join(parts), style="bold")


def _replaced_view(layers: tuple[ReplacedLayer, ...]) -> RenderableType:
    """Return a line for each kind of replacement; layers that are treated alike share it."""
    kinds = Counter((layer.before, _became(layer)) for layer in layers)
    table = Table.grid(padding=(0, 2, 0, 0))
    for (before, after), number in kinds.items():
        table.add_row(f"{number} ×", before, "→", after)
    return table


def _became(layer: ReplacedLayer) -> str:
    if layer.groups is None:
        return layer.after
    size = counted(layer.channels // layer.groups, "channel")
    values = layer.values_per_group
    known = "" if values is None else f", {values:,} values"
    fewer = ""
    if layer.groups_wanted is not None and layer.groups < layer.groups_wanted:
        would = "could" if values is None else "would"
        fewer = f" ({layer.groups_wanted} groups {would} have too few values)"
    return f"{layer.after}, {counted(layer.groups, 'group')} of {size}{known}{fewer}"


def _outputs(swap: Swap) -> str:
    learnt = swap.distillation
    if learnt is not None:
        return (
            f"outputs off by {learnt.distance_before:.3g} σ after the swap, "
            f"{learnt.distance:.3g} σ after step {learnt.best_step}"
        )
    if swap.output_change is None:
        return "outputs not compared: that takes sample= or teacher_data="
    return f"outputs off by {swap.output_change:.3g} σ"


def _advice(swap: Swap) -> str:
    """Return what brings the outputs of a network nearer that has learnt."""
    alone = sum(1 < layer.channels == layer.groups for layer in swap.replaced)
    if not alone:
        return "more steps bring it nearer"
    return (
        f"{counted(alone, 'layer')} with a group for each channel, whose mean is lost there, so "
        "try fewer groups, or 'layer'"
    )
