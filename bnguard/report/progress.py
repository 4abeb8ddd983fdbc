"""Progress bars on long work, drawn on the standard error stream."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# What takes no longer needs no bar.
_LONG_SECONDS = 1.0


class CalibrationBar:
    """A bar that says which layer the samples are at, and how long the rest will take.

    A context manager; the bar appears where the work is long, and is gone afterwards.
    """

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self._progress = Progress(
            TextColumn("recalibrating"),
            BarColumn(),
            TextColumn("{task.fields[samples]:,} samples {task.fields[layer]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._progress.add_task("", total=None, samples=0, layer="")
        self._samples = self._layers = 1

    def __enter__(self) -> CalibrationBar:
        self._begin = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress.live.is_started:
            self._progress.stop()

    def start(self, samples: int, layers: int) -> None:
        """Begin anew: so many samples are to pass so many layers."""
        self._samples, self._layers = max(1, samples), max(1, layers)
        total = self._samples * self._layers
        self._progress.reset(self._task, total=total, samples=samples, layer=self._layer(0))

    def advance(self, samples: int) -> None:
        """So many samples passed one more layer; may be called from any thread."""
        if time.monotonic() - self._begin >= _LONG_SECONDS:
            self._progress.start()  # Again and again, which does nothing.
        self._progress.advance(self._task, samples)
        done = int(self._progress.tasks[0].completed) // self._samples
        self._progress.update(self._task, layer=self._layer(done))

    def _layer(self, done: int) -> str:
        """Return which layer the samples are at; nothing where they pass all of them at once."""
        return f"layer {min(done + 1, self._layers)}/{self._layers}" if self._layers > 1 else ""
