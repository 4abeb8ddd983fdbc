"""The result of a recalibration: statistics before and after, what was skipped, and the undo."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from bnguard import __version__
from bnguard.errors import CalibrationError
from bnguard.findings import counted
from bnguard.layers.distances import FloatArray, log_variance_ratio, shift_std
from bnguard.observe.history import ModeGap, RunningStatistics
from bnguard.recalibration.options import SkippedLayer
from bnguard.report.views import ResultView

# Importing rich draws from Python's random state, so only printing imports it.
if TYPE_CHECKING:
    from rich.console import RenderableType

_MOST_LAYERS_SHOWN = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerChange:
    """How far the statistics of a layer moved.

    Attributes:
        eps: The value that the layer adds to the variance.
        values: Values per channel that the new statistics come from.
    """

    name: str
    before: RunningStatistics
    after: RunningStatistics
    eps: float
    values: int

    @cached_property
    def shift_std(self) -> FloatArray:
        """Shift of the mean in standard deviations from before, shape ``(C,)``."""
        with np.errstate(all="ignore"):  # The extremes are None if a channel was not finite.
            return shift_std(self.after.mean, self.before.mean, self.before.var, self.eps)

    @cached_property
    def log_variance_ratio(self) -> FloatArray:
        """Natural logarithm of the variance after divided by before, shape ``(C,)``."""
        with np.errstate(all="ignore"):
            return log_variance_ratio(self.after.var, self.before.var, self.eps)

    @property
    def max_shift_std(self) -> float | None:
        """Largest shift of a channel, without its sign; None if one was not finite before."""
        return _extreme(np.abs(self.shift_std))

    @property
    def extreme_log_variance_ratio(self) -> float | None:
        """The log-variance ratio furthest from 0; None if one was not finite before."""
        return _extreme(self.log_variance_ratio)

    @property
    def distance(self) -> float:
        """The larger of the two, to sort by; infinite if unknown."""
        shift, ratio = self.max_shift_std, self.extreme_log_variance_ratio
        return math.inf if shift is None or ratio is None else max(shift, abs(ratio))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Recalibration(ResultView):
    """What :func:`bnguard.recalibrate` did.

    Attributes:
        method: ``"exact"``, ``"precise"`` or ``"adapt"``.
        layers: How far each layer moved, in the order of the model.
        skipped: BN layers that stay as they were, and why.
        samples: Samples that the statistics come from, on all ranks.
        batches: Batches that they come from.
        virtual_batches: Number of virtual batches that these ran as; with ``exact`` and ``adapt``,
            1 is the result of one giant batch.
        left_out: Batches that were left out because they bring NaN or Inf to a layer.
        is_kept: Whether the model has the new statistics; False if they were rolled back.
        mode_gap_before: Mode gap with the statistics from before, on up to 64 samples of the
            calibration set; or why it was not measured.
        mode_gap_after: The same with the new statistics.
        score_before: Score with the statistics from before; None without ``score``.
        score_after: Score with the new ones.
        restore: Restores the statistics and counters from before; :meth:`undo` calls it.
        notes: What else a reader should know, a sentence each.
    """

    method: str
    layers: tuple[LayerChange, ...]
    skipped: tuple[SkippedLayer, ...]
    samples: int
    batches: int
    virtual_batches: int
    left_out: int
    is_kept: bool
    mode_gap_before: ModeGap | str
    mode_gap_after: ModeGap | str
    score_before: float | None = None
    score_after: float | None = None
    notes: tuple[str, ...] = ()
    restore: Callable[[], None]

    @property
    def before(self) -> Mapping[str, RunningStatistics]:
        """Statistics from before, by the name of the layer."""
        return {layer.name: layer.before for layer in self.layers}

    @property
    def after(self) -> Mapping[str, RunningStatistics]:
        """New statistics, by the name of the layer."""
        return {layer.name: layer.after for layer in self.layers}

    def undo(self) -> None:
        """Restore the statistics and counters from before.

        Raises:
            CalibrationError: This is a copy, or was loaded from a file, and so has no model.
        """
        self.restore()

    def to_dict(self) -> dict[str, Any]:
        """Return what the recalibration did as plain data for JSON.

        Schema version 1: ``schema``, ``bnguard``, ``method``, ``samples``, ``batches``,
        ``virtual_batches``, ``left_out``, ``kept`` (whether the model has the new statistics),
        ``score_before``, ``score_after``, ``mode_gap_before`` and ``mode_gap_after`` (in standard
        deviations of the outputs; null if not measured), ``layers`` (each with ``name``,
        ``values``, ``max_shift_std``, ``log_variance_ratio``), ``skipped`` (each with ``name`` and
        ``reason``), ``notes``.
        """
        from bnguard.report.json_document import SCHEMA, strict_json

        document = {
            "schema": SCHEMA,
            "bnguard": __version__,
            "method": self.method,
            "samples": self.samples,
            "batches": self.batches,
            "virtual_batches": self.virtual_batches,
            "left_out": self.left_out,
            "kept": self.is_kept,
            "score_before": self.score_before,
            "score_after": self.score_after,
            "mode_gap_before": _change_of(self.mode_gap_before),
            "mode_gap_after": _change_of(self.mode_gap_after),
            "layers": [
                {
                    "name": layer.name,
                    "values": layer.values,
                    "max_shift_std": layer.max_shift_std,
                    "log_variance_ratio": layer.extreme_log_variance_ratio,
                }
                for layer in self.layers
            ],
            "skipped": [dataclasses.asdict(layer) for layer in self.skipped],
            "notes": list(self.notes),
        }
        return cast("dict[str, Any]", strict_json(document))

    def __getstate__(self) -> dict[str, Any]:
        """Return the numbers without the model, for a copy, a file or another process."""
        return {**vars(self), "restore": _refuse_to_restore}

    def __repr__(self) -> str:
        """Return the recalibration in one line."""
        return (
            f"Recalibration(method={self.method!r}, layers={len(self.layers)}, "
            f"skipped={len(self.skipped)}, samples={self.samples}, is_kept={self.is_kept})"
        )

    def __rich__(self) -> RenderableType:
        """Return a summary that fits 80 columns, and is readable without colour."""
        from rich.console import Group
        from rich.text import Text

        parts = [_show_heading(self), *_show_layers(self.layers)]
        if self.skipped:
            parts.append(_show_skipped(self.skipped))
        parts.append(_show_gap(self.mode_gap_before, self.mode_gap_after))
        if self.score_before is not None and self.score_after is not None:
            verdict = "kept" if self.is_kept else "rolled back"
            change = f"{self.score_before:.4g} → {self.score_after:.4g}"
            parts.append(Text(f"score {change}: {verdict}", style="bold"))
        parts += [Text(f"note: {note}") for note in self.notes]
        return Group(*parts)


def _refuse_to_restore() -> None:
    raise CalibrationError(
        "a copied or stored result has no model to undo anything on: call undo() of the original"
    )


def _extreme(values: FloatArray) -> float | None:
    if not np.isfinite(values).all():
        return None
    return float(values[np.argmax(np.abs(values))])


def _change_of(gap: ModeGap | str) -> float | None:
    return None if isinstance(gap, str) else gap.relative_change


def _show_heading(recalibration: Recalibration) -> RenderableType:
    from rich.text import Text

    parts = [
        "recalibrated" if recalibration.is_kept else "not recalibrated",
        recalibration.method,
        counted(len(recalibration.layers), "BN layer"),
        counted(recalibration.samples, "sample"),
        counted(recalibration.batches, "batch", "batches"),
    ]
    return Text(" · ".join(parts), style="bold" if recalibration.is_kept else "bold yellow")


def _show_layers(layers: Sequence[LayerChange]) -> list[RenderableType]:
    from rich.text import Text

    from bnguard.report.terminal import layer_table, moved_text

    shown = sorted(layers, key=lambda layer: layer.distance, reverse=True)[:_MOST_LAYERS_SHOWN]
    rows = (
        (
            layer.name or "(the model)",
            f"{layer.values:,}",
            *moved_text(layer.max_shift_std, layer.extreme_log_variance_ratio),
        )
        for layer in shown
    )
    title = Text("How far the statistics moved, the furthest first", style="dim")
    headings = ("layer", "n", "shift, σ", "variance off by")
    return [title, layer_table(headings, rows, len(layers) - len(shown))]


def _show_gap(before: ModeGap | str, after: ModeGap | str) -> RenderableType:
    from rich.text import Text

    if isinstance(after, str):
        return Text(f"mode gap not measured: {after}", style="dim")
    first = "?" if isinstance(before, str) else f"{before.relative_change:.3g}"
    change = f"{first} → {after.relative_change:.3g} σ of the outputs"
    noise = after.sampling_change
    sampling = "" if noise is None else f" (sampling alone: {noise:.2g})"
    batch = counted(after.samples, "sample") if after.samples else "1 batch"
    return Text(f"mode gap {change}{sampling}, on {batch}")


def _show_skipped(skipped: Sequence[SkippedLayer]) -> RenderableType:
    """Return the skipped layers, one line per reason."""
    from rich.text import Text

    by_reason: dict[str, list[str]] = {}
    for layer in skipped:
        by_reason.setdefault(layer.reason, []).append(layer.name or "(the model)")
    lines = []
    for reason, names in by_reason.items():
        more = f" (and {len(names) - 1:,} more like it)" if len(names) > 1 else ""
        lines.append(f"skipped: {names[0]}{more} {reason}")
    return Text("\n".join(lines), style="yellow")
