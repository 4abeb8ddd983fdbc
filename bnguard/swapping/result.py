"""What a swap did: the new model, what was replaced, what was not and why, and what it cost."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from bnguard import __version__
from bnguard.findings import counted
from bnguard.recalibration.options import SkippedLayer
from bnguard.report.views import ResultView
from bnguard.swapping.distillation import Distillation

if TYPE_CHECKING:
    from rich.console import RenderableType


# A network whose outputs stay further off, in standard deviations, has lost points of accuracy, ...
_FAR_OFF_STD = 0.25
# ... and one as far off as this is another network.
HARMFUL_CHANGE_STD = 0.5


@dataclass(frozen=True)
class ReplacedLayer:
    """A BN layer that has another in its place.

    Attributes:
        name: Dotted name of the layer.
        before: Class of the BN layer.
        after: Class of what normalises in its place.
        groups: Groups of a group norm; None for other norms.
        positions: Values per channel and sample that reach the layer; None without a sample.
        channels: C, the number of channels.
    """

    name: str
    before: str
    after: str
    groups: int | None
    positions: int | None
    channels: int

    @property
    def values_per_group(self) -> int | None:
        """Values that a group of one sample has; None if not known."""
        if self.groups is None or self.positions is None:
            return None
        return self.channels // self.groups * self.positions


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Swap(ResultView):
    """What :func:`bnguard.swap` did.

    Attributes:
        model: The model with the other norm, a plain module; the model as it was if not kept.
        is_kept: Whether the swapped model is kept; False if it was clearly worse once taught.
        is_in_place: Whether the model that was passed is the one that changed.
        to: What BN was swapped for.
        replaced: The layers replaced, in the order of the model.
        skipped: BN layers that were not replaced, and why.
        output_change: Root mean square change of the outputs in eval mode by the swap alone, in
            standard deviations of the outputs; None without a sample.
        distillation: How the distillation went; None without one.
        score_before: What ``score`` gave for the teacher, in the mode in which it taught; None
            without a score.
        score_after: What ``score`` gave for the swapped model.
        notes: What else a reader should know, a sentence each.
    """

    model: nn.Module
    is_kept: bool
    is_in_place: bool
    to: str
    replaced: tuple[ReplacedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    output_change: float | None
    distillation: Distillation | None
    score_before: float | None
    score_after: float | None
    notes: tuple[str, ...]

    @property
    def groups(self) -> dict[str, int]:
        """Groups by the name of the layer, as ``groups=`` takes them to make the swap again."""
        return {layer.name: layer.groups for layer in self.replaced if layer.groups is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return what was replaced and how far the outputs moved, as plain data for JSON."""
        from bnguard.report.json_document import SCHEMA, strict_json

        done = self.distillation
        document = {
            "schema": SCHEMA,
            "bnguard": __version__,
            "to": self.to,
            "kept": self.is_kept,
            "score_before": self.score_before,
            "score_after": self.score_after,
            "replaced": [
                {
                    "name": layer.name,
                    "before": layer.before,
                    "after": layer.after,
                    "groups": layer.groups,
                    "values_per_group": layer.values_per_group,
                }
                for layer in self.replaced
            ],
            "skipped": [dataclasses.asdict(layer) for layer in self.skipped],
            "output_change": self.output_change,
            "distillation": None if done is None else dataclasses.asdict(done),
            "notes": list(self.notes),
        }
        return cast("dict[str, Any]", strict_json(document))

    def __repr__(self) -> str:
        """Return the swap in one line."""
        layers, left = len(self.replaced), len(self.skipped)
        return f"Swap(to={self.to!r}, replaced={layers}, skipped={left})"

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        kinds = Counter((layer.before, _describe_norm(layer)) for layer in self.replaced)
        table = Table.grid(padding=(0, 2, 0, 0))
        for (before, after), number in kinds.items():
            table.add_row(f"{number} ×", before, "→", after)
        lines = [f"left  {layer.name} {layer.reason}" for layer in self.skipped]
        lines.append(_describe_outputs(self))
        if self.distillation is not None and self.distillation.distance > _FAR_OFF_STD:
            lines.append("still far off, so measure it before use: more steps bring it closer")
        if self.score_before is not None and self.score_after is not None:
            lines.append(f"score {self.score_before:.4g} → {self.score_after:.4g}")
        if not self.is_kept:
            is_nan = self.score_after is not None and math.isnan(self.score_after)
            why = "its score is NaN" if is_nan else "it is clearly worse"
            lines.append(f"not kept, since {why} (keep='always' keeps it anyway)")
        elif not self.is_in_place:
            lines.append("the model that you passed is unchanged: the swapped one is .model")
        lines += self.notes
        style = "bold" if self.is_kept else "bold yellow"
        return Group(Text(_heading(self), style=style), table, *map(Text, lines))


def _heading(swap: Swap) -> str:
    done = "swapped" if swap.is_kept else "not swapped"
    parts = [f"{done} ({swap.to})", counted(len(swap.replaced), "BN layer")]
    if swap.skipped:
        parts.append(f"{len(swap.skipped)} left")
    if swap.distillation is not None:
        parts.append(counted(swap.distillation.steps, "step"))
    return " · ".join(parts)


def _describe_norm(layer: ReplacedLayer) -> str:
    if layer.groups is None:
        return layer.after
    size = counted(layer.channels // layer.groups, "channel")
    values = layer.values_per_group
    known = "" if values is None else f", {values:,} values"
    return f"{layer.after}, {counted(layer.groups, 'group')} of {size}{known}"


def _describe_outputs(swap: Swap) -> str:
    done = swap.distillation
    if done is not None:
        return (
            f"outputs off by {done.distance_before:.3g} σ after the swap, "
            f"{done.distance_fitted:.3g} σ once fitted, "
            f"{done.distance:.3g} σ after step {done.best_step}"
        )
    if swap.output_change is None:
        return "outputs not compared: give a sample or teacher_data"
    return f"outputs off by {swap.output_change:.3g} σ"
