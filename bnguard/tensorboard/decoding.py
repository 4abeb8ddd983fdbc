"""From the events of a log to arrays in the order of steps; refuses what does not fit."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bnguard.tensorboard.metadata import LogError
from bnguard.tensorboard.records import Record, decode_findings

# A step's tensor beyond this is refused: 20,000 layers of 64 metrics are 5 MB.
MOST_VALUES_A_STEP = 4_000_000


class Event(Protocol):
    """One event of a tag, as TensorBoard's data provider hands it out."""

    @property
    def step(self) -> int:
        """Training step."""

    @property
    def wall_time(self) -> float:
        """When it was written, in seconds since the epoch."""

    @property
    def numpy(self) -> npt.NDArray[Any]:
        """The tensor."""


@dataclass(frozen=True, eq=False)
class Series:
    """Arrays of one shape, a step each.

    Attributes:
        steps: Ascending, each once; shape ``(S,)``, float64.
        values: Shape ``(S, …)``, float32.
        names: What the rows of a step are, where they have names of their own.
        left_out: Why events are missing here; empty where none is.
    """

    steps: npt.NDArray[np.float64]
    values: npt.NDArray[np.float32]
    names: tuple[str, ...] = ()
    left_out: str = ""

    def pack(self) -> bytes:
        """Return the series as bytes, in which NaN and Inf survive.

        Little-endian: a uint32 with the length of the JSON that follows (``shape``, ``names``;
        padded, so that 8 divides what precedes the numbers), the steps as float64, the values as
        float32.
        """
        head = json.dumps({"shape": self.values.shape, "names": self.names}).encode()
        head += b" " * (-(len(head) + 4) % 8)
        return b"".join(
            [
                len(head).to_bytes(4, "little"),
                head,
                self.steps.astype("<f8").tobytes(),
                self.values.astype("<f4").tobytes(),
            ]
        )


def stats_series(events: Iterable[Event], shape: tuple[int, int]) -> Series:
    """Return the statistics of a run: every event whose tensor has the shape of the header.

    Raises:
        LogError: None has.
    """
    return _series(events, shape)


def channel_series(events: Iterable[Event], rows: Sequence[str]) -> Series:
    """Return the channel snapshots of a layer; the newest says how many channels there are.

    Raises:
        LogError: None has the rows announced.
    """
    events = list(events)
    fitting = [event for event in events if event.numpy.shape[:-1] == (len(rows),)]
    if not fitting:
        raise LogError(f"no channel snapshot has the {len(rows)} rows that were announced")
    return _series(events, _by_step(fitting)[-1].numpy.shape, tuple(rows))


def newest_findings(events: Iterable[Event]) -> tuple[list[Record], str]:
    """Return the newest findings that are readable, and why newer ones are not, if there are any.

    Each event holds all findings so far.
    """
    problem = ""
    for event in sorted(events, key=lambda event: (event.wall_time, event.step), reverse=True):
        try:
            text = event.numpy.reshape(-1)[0]
            return decode_findings(text if isinstance(text, bytes) else str(text).encode()), problem
        except (ValueError, IndexError) as error:
            why = "it holds no text" if isinstance(error, IndexError) else error
            problem = problem or f"the findings of step {event.step} are not readable: {why}"
    return [], problem


def thinned(series: Series, most_steps: int) -> Series:
    """Return at most so many steps: each stands for a bin, with its largest absolute values.

    A peak of a single step survives; NaN stands only where a whole bin is NaN.

    >>> series = Series(np.arange(4.0), np.array([[0.0], [-9.0], [1.0], [2.0]], dtype=np.float32))
    >>> thinned(series, 2).values.ravel().tolist()
    [-9.0, 2.0]
    """
    count = len(series.steps)
    if count <= most_steps:
        return series
    edges = np.linspace(0, count, most_steps + 1).astype(int)
    bins = [series.values[a:b] for a, b in itertools.pairwise(edges)]
    return Series(series.steps[edges[1:] - 1], np.stack([_peaks(bin_) for bin_ in bins]))


def _peaks(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    size = np.where(np.isnan(values), -1.0, np.abs(values))
    place = size.argmax(axis=0, keepdims=True)
    return np.asarray(np.take_along_axis(values, place, axis=0)[0])


def _series(events: Iterable[Event], shape: tuple[int, ...], names: tuple[str, ...] = ()) -> Series:
    if math.prod(shape) > MOST_VALUES_A_STEP:
        raise LogError(f"a tensor of shape {_shown(shape)} a step is too large to be shown")
    events = list(events)
    fitting = [
        event for event in events if event.numpy.shape == shape and event.numpy.dtype.kind == "f"
    ]
    if not fitting:
        raise LogError(f"no event has the shape {_shown(shape)} that was announced")
    missing = len(events) - len(fitting)
    were_left_out = "1 event was" if missing == 1 else f"{missing} events were"
    ordered = _by_step(fitting)
    with np.errstate(over="ignore"):  # Too large for float32 is infinite.
        values = np.stack([event.numpy for event in ordered]).astype(np.float32)
    return Series(
        steps=np.array([event.step for event in ordered], dtype=np.float64),
        values=values,
        names=names,
        left_out=f"{were_left_out} left out: of another shape or type, or damaged"
        if missing
        else "",
    )


def _by_step(events: Iterable[Event]) -> list[Event]:
    """Return the events by step; of those of one step, which a resumed run writes, the newest."""
    newest = {event.step: event for event in sorted(events, key=lambda event: event.wall_time)}
    return [newest[step] for step in sorted(newest)]


def _shown(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
