"""How far a calibration is, told to whoever shows it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how far a calibration is, from any thread."""

    def start(self, samples: int, layers: int) -> None:
        """Begin anew: so many samples are to pass so many layers."""

    def advance(self, samples: int) -> None:
        """So many samples passed one more layer."""


class Silent:
    """Shows nothing."""

    def start(self, samples: int, layers: int) -> None:
        """Do nothing."""

    def advance(self, samples: int) -> None:
        """Do nothing."""
