"""A layer whose running statistics do not fit what arrives, and what it can be compared with."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from bnguard.layers.distances import log_variance_ratio, shift_std, without_initial
from bnguard.observe.history import EvalWindow, LayerHistory
from bnguard.rules.limits import Distance, DriftLimits

# Share of a drift that the newest batches have to show too where moving weights make it: those of
# networks that learn as usual show at most 0.26 of what other data make at the first layer, and 0.8
# and more where the statistics lag.
_MOVED_SHARE = 0.35


@dataclass(frozen=True)
class Drift:
    """A layer whose eval moments do not fit its running statistics, and what surrounds it.

    Attributes:
        layer: The layer.
        seen: What arrived at it in eval mode.
        distance: How far that is from the running statistics.
        limits: What it was held against.
        first: The layer that was called first.
    """

    layer: LayerHistory
    seen: EvalWindow
    distance: Distance
    limits: DriftLimits
    first: LayerHistory

    def from_batches(self) -> Distance | None:
        """Return how far what arrived is from the newest batches of training."""
        window = self.layer.window
        if window is None or self.distance.worst is None:
            return None
        distance = self.limits.distance(self.seen, window.mean, window.var_unbiased, self.layer.eps)
        return None if distance.worst is None else distance

    def without_initial(self) -> Distance | None:
        """Return how far what arrived is from what training alone put into the statistics."""
        weight, running = self.layer.initial_weight_when_evaluated, self.seen.running
        if weight is None or weight >= 1.0:
            return None
        mean, var = without_initial(running.mean, running.var, weight)
        return self.limits.distance(self.seen, mean, var, self.layer.eps)

    def at_first(self) -> Drift:
        """Return how far the layer that was called first is off; this, where that is not known."""
        seen = self.first.evaluated
        if seen is None or self.layer is self.first:
            return self
        running = seen.running
        distance = self.limits.distance(seen, running.mean, running.var, self.first.eps)
        return dataclasses.replace(self, layer=self.first, seen=seen, distance=distance)

    def is_moved(self) -> bool:
        """Return whether the newest batches lie as far from the running statistics as it does.

        Nothing but the weights takes the batches of training away from their own average, once the
        initial values are forgotten.
        """
        window, running = self.layer.window, self.seen.running
        if window is None:
            return False
        shift = np.abs(shift_std(window.mean, running.mean, running.var, self.layer.eps))
        ratio = np.abs(log_variance_ratio(window.var_unbiased, running.var, self.layer.eps))
        moved = dataclasses.replace(self.distance, shift=shift, ratio=ratio)
        return moved.excess > _MOVED_SHARE * self.distance.excess
