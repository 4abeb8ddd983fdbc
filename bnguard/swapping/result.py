"""What a swap did: the new model, what was replaced, what was not and why, and what it cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from bnguard.recalibration.options import SkippedLayer
from bnguard.swapping.distillation import Distillation
from bnguard.version import __version__

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class ReplacedLayer:
    """A BN layer that has another in its place.

    Attributes:
        name: Dotted name of the layer.
        before: Class of the BN layer.
        after: Class of what normalises in its place.
        groups: Groups of a group norm; None for what has none.
        groups_wanted: Groups that it would have, had each enough values; None where none decide.
        positions: Values a channel and sample that arrive at the layer; None where no sample told.
        channels: C, the number of channels.
    """

    name: str
    before: str
    after: str
    groups: int | None
    groups_wanted: int | None
    positions: int | None
    channels: int

    @property
    def values_per_group(self) -> int | None:
        """Values that a group of one sample has; None where not known."""
        if self.groups is None or self.positions is None:
            return None
        return self.channels // self.groups * self.positions


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Swap:
    """What :func:`bnguard.swap` did.

    Attributes:
        model: The model with the other norm, a plain module.
        to: What BN was swapped for.
        replaced: The layers replaced, in the order of the model.
        skipped: BN layers that were left, and why.
        output_change: Root mean square change of the outputs in eval mode by the swap alone, in
            standard deviations of the outputs; None without a sample.
        distillation: How the distillation went; None where there was none.
        notes: What a reader should know besides, a sentence each.
    """

    model: nn.Module
    to: str
    replaced: tuple[ReplacedLayer, ...]
    skipped: tuple[SkippedLayer, ...]
    output_change: float | None
    distillation: Distillation | None
    notes: tuple[str, ...]

    @property
    def groups(self) -> dict[str, int]:
        """Groups by the name of the layer, as ``groups=`` takes them to make the swap again."""
        return {layer.name: layer.groups for layer in self.replaced if layer.groups is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return what was replaced and how far the outputs moved, as plain data for JSON."""
        from bnguard.report.json_document import SCHEMA, strict_json

        learnt = self.distillation
        document = {
            "schema": SCHEMA,
            "bnguard": __version__,
            "to": self.to,
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
            "distillation": None if learnt is None else dataclasses.asdict(learnt),
            "notes": list(self.notes),
        }
        return cast("dict[str, Any]", strict_json(document))

    def __repr__(self) -> str:
        """Return the swap in one line."""
        layers, left = len(self.replaced), len(self.skipped)
        return f"Swap(to={self.to!r}, replaced={layers}, skipped={left})"

    def __rich__(self) -> RenderableType:
        from bnguard.swapping.view import swap_view

        return swap_view(self)

    def __str__(self) -> str:
        from bnguard.report.terminal import as_text

        return as_text(self)
