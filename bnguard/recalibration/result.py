"""What a recalibration did: the statistics before and after, what was skipped, and the way back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bnguard.errors import CalibrationError
from bnguard.layers.distances import FloatArray, log_variance_ratio, shift_std
from bnguard.observe.history import ModeGap, RunningStatistics
from bnguard.recalibration.selection import SkippedLayer

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerChange:
    """How far the statistics of a layer moved.

    Attributes:
        name: Dotted name of the layer.
        before: The statistics that the layer had.
        after: The statistics that were computed.
        eps: What the layer adds to the variance.
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
        before = self.before
        with np.errstate(all="ignore"):  # What was not finite before is None in the extremes.
            return shift_std(self.after.mean, before.mean, before.var, self.eps)

    @cached_property
    def log_variance_ratio(self) -> FloatArray:
        """Natural logarithm of the variance after over the one before, shape ``(C,)``."""
        with np.errstate(all="ignore"):
            return log_variance_ratio(self.after.var, self.before.var, self.eps)

    @property
    def max_shift_std(self) -> float | None:
        """Largest shift of a channel, without its sign; None where one was not finite before."""
        return _extreme(np.abs(self.shift_std))

    @property
    def extreme_log_variance_ratio(self) -> float | None:
        """The log-variance ratio furthest from 0; None where one was not finite before."""
        return _extreme(self.log_variance_ratio)

    @property
    def distance(self) -> float:
        """How far the layer moved, to sort by: the larger of the two; infinite where unknown."""
        shift, ratio = self.max_shift_std, self.extreme_log_variance_ratio
        return math.inf if shift is None or ratio is None else max(shift, abs(ratio))


@dataclass(frozen=True, kw_only=True, eq=False)
class Recalibration:
    """What :func:`bnguard.recalibrate` did.

    Attributes:
        method: How the statistics were computed.
        layers: How far each layer moved, in the order of the model.
        skipped: BN layers that stay as they were, and why.
        samples: Samples that the statistics come from, on all ranks.
        batches: Batches that they come from.
        virtual_batches: As how many virtual batches these ran; with ``exact`` and ``adapt``, 1 is
            the result of one giant batch.
        left_out: Batches that were left out since they bring NaN or Inf to a layer.
        is_kept: Whether the model has the new statistics; False where they were taken back.
        score_before: What ``score`` gave with the statistics from before; None without a score.
        score_after: What ``score`` gave with the new ones.
        gap_with: Measures the mode gap with statistics like ``before``; or says why it cannot.
        restore: Puts the statistics and counters from before back; :meth:`undo` calls it.
        notes: What a reader should know besides, a sentence each.
    """

    method: str
    layers: tuple[LayerChange, ...]
    skipped: tuple[SkippedLayer, ...]
    samples: int
    batches: int
    virtual_batches: int
    left_out: int
    is_kept: bool
    score_before: float | None = None
    score_after: float | None = None
    notes: tuple[str, ...] = ()
    gap_with: Callable[[Mapping[str, RunningStatistics]], ModeGap | str] = field(repr=False)
    restore: Callable[[], None] = field(repr=False)

    @property
    def before(self) -> Mapping[str, RunningStatistics]:
        """Statistics before, by the name of the layer."""
        return {layer.name: layer.before for layer in self.layers}

    @property
    def after(self) -> Mapping[str, RunningStatistics]:
        """Statistics that were computed, by the name of the layer."""
        return {layer.name: layer.after for layer in self.layers}

    @cached_property
    def mode_gap_before(self) -> ModeGap | str:
        """Mode gap with the statistics from before, or why it could not be measured.

        On up to 64 samples of the calibration set, and with the weights that the model has when
        this is first asked for, which is when it is measured: printing asks for it.
        """
        return self.gap_with(self.before)

    @cached_property
    def mode_gap_after(self) -> ModeGap | str:
        """The same with the statistics that were computed."""
        return self.gap_with(self.after)

    def undo(self) -> None:
        """Give the model the statistics and counters that it had before.

        Raises:
            CalibrationError: This is a copy, or was loaded from a file: the model is not with it.
        """
        self.restore()

    def __getstate__(self) -> dict[str, Any]:
        """Return the numbers without the model, for a copy, a file or another process."""
        return {**vars(self), "gap_with": _gap_without_model, "restore": _restore_without_model}

    def __rich__(self) -> RenderableType:
        from bnguard.report.recalibration import recalibration_view

        return recalibration_view(self)

    def __str__(self) -> str:
        from bnguard.report.terminal import as_text

        return as_text(self)


def _gap_without_model(statistics: Mapping[str, RunningStatistics]) -> str:
    return "it was not measured before the result was copied or stored"


def _restore_without_model() -> None:
    raise CalibrationError(
        "a copied or stored result has no model to undo anything on: call undo() of the original"
    )


def _extreme(values: FloatArray) -> float | None:
    if not np.isfinite(values).all():
        return None
    return float(values[np.argmax(np.abs(values))])
