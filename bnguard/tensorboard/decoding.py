"""From the events of a log to arrays in the order of steps; refuses what does not fit."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bnguard.tensorboard.metadata import LogError
from bnguard.tensorboard.records import Record, decode_findings

# A step's tensor beyond this is refused: 20,000 layers of 64 metrics are 5 MB.
_MOST_VALUES_A_STEP = 4_000_000


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
        LogError: There are none, or the newest has not the rows announced.
    """
    ordered = _by_step(events)
    newest = ordered[-1].numpy if ordered else np.zeros(0)
    if newest.ndim != 2 or newest.shape[0] != len(rows):
        raise LogError(
            f"the channel snapshots have shape {_shown(newest.shape)}, and {len(rows)} rows were "
            "announced"
        )
    return _series(ordered, newest.shape, tuple(rows))


def newest_findings(events: Iterable[Event]) -> list[Record]:
    """Return the findings written last; each event holds all findings so far.

    Raises:
        LogError: They are not readable.
    """
    newest = max(events, key=lambda event: (event.wall_time, event.step), default=None)
    if newest is None:
        return []
    try:
        text = newest.numpy.reshape(-1)[0]
        return decode_findings(text if isinstance(text, bytes) else str(text).encode())
    except (ValueError, IndexError) as error:
        raise LogError(f"the findings of the run are not readable: {error}") from None


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
    if int(np.prod(shape)) > _MOST_VALUES_A_STEP:
        raise LogError(f"a tensor of shape {_shown(shape)} a step is too large to be shown")
    ordered = _by_step(events)
    fitting = [
        event for event in ordered if event.numpy.shape == shape and event.numpy.dtype.kind == "f"
    ]
    if not fitting:
        raise LogError(f"no event has the shape {_shown(shape)} that was announced")
    missing = len(ordered) - len(fitting)
    return Series(
        steps=np.array([event.step for event in fitting], dtype=np.float64),
        values=np.stack([event.numpy for event in fitting]).astype(np.float32),
        names=names,
        left_out=f"{missing} events of another shape were left out" if missing else "",
    )


def _by_step(events: Iterable[Event]) -> list[Event]:
    """Return the events by step; of those of one step, which a resumed run writes, the newest."""
    newest = {event.step: event for event in sorted(events, key=lambda event: event.wall_time)}
    return [newest[step] for step in sorted(newest)]


def _shown(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
