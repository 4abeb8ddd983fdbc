"""Whether what the model is given is finite: a NaN in the data is not a fault of the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Sums that wait on the device before they are looked at, where nobody asks earlier.
_MAX_WAITING = 256


class FinitenessProbe:
    """Finds the first training step whose input held NaN or Inf.

    Adds up each input, in which a NaN or an Inf stays, and looks at the sums when asked: nothing
    waits for the device until then.
    """

    def __init__(self) -> None:
        self.step = 1
        self._first_bad_step: int | None = None
        self._waiting: list[tuple[int, Tensor]] = []

    def note(self, inputs: Sequence[Tensor]) -> None:
        """Take in what a batch brings to the model."""
        if self._first_bad_step is not None:
            return
        for values in inputs:
            # In float32 at least: a sum in float16 overflows by itself.
            dtype = torch.promote_types(values.dtype, torch.float32)
            self._waiting.append((self.step, values.detach().sum(dtype=dtype)))
        if len(self._waiting) >= _MAX_WAITING:
            self.first_bad_step()

    def first_bad_step(self) -> int | None:
        """Return the first step whose input was not finite; None where all were, or not seen."""
        waiting, self._waiting = self._waiting, []
        if waiting and self._first_bad_step is None:
            device = waiting[0][1].device
            sums = torch.stack([total.float().to(device) for _, total in waiting])
            bad = (~sums.isfinite()).nonzero().flatten().tolist()
            self._first_bad_step = waiting[bad[0]][0] if bad else None
        return self._first_bad_step
