"""Reads runs through TensorBoard's data provider, for the tab and the one-file page.

Events become arrays in the order of steps; events that do not fit are left out.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from tensorboard.data import provider as provider_api
from tensorboard.data.proto import data_provider_pb2
from tensorboard.util import tensor_util

from bnguard.findings import Finding, FindingGroup
from bnguard.tensorboard.metadata import (
    CHANNELS_TAG,
    FINDINGS_TAG,
    PLUGIN_NAME,
    STATS_TAG,
    Header,
    LogError,
    Metric,
    decode_rows,
)
from bnguard.tensorboard.records import (
    Record,
    as_findings,
    decode_findings,
    group_causes,
    json_number,
)

# A step's tensor beyond this is refused: 20,000 layers of 64 metrics are 5 MB.
MOST_VALUES_A_STEP = 4_000_000
# More than TensorBoard was asked to keep: whatever it has.
_ALL_STEPS = 1_000_000
_MOST_SERIES_KEPT = 8
_Key = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class LogReader:
    """Reads the runs of one experiment for one request.

    Attributes:
        provider: TensorBoard's data provider.
        context: Its request context, which may hold the user's identity.
        experiment: Its experiment id.
        cache: Outlives the request.
        damages: What the caller could not read, by the name of the run.
    """

    provider: Any
    context: Any
    experiment: str
    cache: SeriesCache
    damages: Mapping[str, str] = field(default_factory=dict)

    def runs(self) -> list[dict[str, Any]]:
        """Return the runs that bnguard logged: version, problem, and root causes by severity."""
        listed = self.provider.list_tensors(
            self.context, experiment_id=self.experiment, plugin_name=PLUGIN_NAME
        )
        hidden = [
            {"name": name, "version": "", "problem": damage, "causes": {}}
            for name, damage in self.damages.items()
            if name not in listed
        ]
        runs = [self._describe_run(name, tags) for name, tags in listed.items()]
        return sorted([*runs, *hidden], key=lambda run: str(run["name"]))

    def _describe_run(self, name: str, tags: Mapping[str, Any]) -> dict[str, Any]:
        problem, causes = "", Counter[str]()
        try:
            _header(tags)
            records, _ = self._findings(name, tags)
            roots = group_causes(as_findings(records))
            causes = Counter(str(root.worst.severity) for root in roots)
        except LogError as error:
            problem = str(error)
        return {"name": name, "version": _version(tags), "problem": problem, "causes": causes}

    def _findings(self, name: str, tags: Mapping[str, Any]) -> tuple[list[Record], str]:
        return newest_findings(self._events(name, FINDINGS_TAG) if FINDINGS_TAG in tags else [])

    def run(self, name: str) -> dict[str, Any]:
        """Return layers, metrics, steps and findings of a run, and the layers with channels.

        Raises:
            LogError: The run does not exist or cannot be shown; so do the other methods.
        """
        tags = self._tags(name)
        header, series = _header(tags), self._stats(name, tags)
        records, unreadable = self._findings(name, tags)
        records = [{**record, "step": since(record, header, series)} for record in records]
        findings = as_findings(records)
        problems = [self.damages.get(name, ""), series.left_out, unreadable]
        return {
            "name": name,
            "version": _version(tags),
            "layers": header.layers,
            "kinds": header.kinds,
            "metrics": [
                {**asdict(metric), **_state(metric, series.values[:, row])}
                for row, metric in enumerate(header.metrics)
            ],
            "steps": len(series.steps),
            "first_step": series.steps[0],
            "last_step": series.steps[-1],
            "findings": [
                {**record, "evidence": {**record["evidence"], "text": str(finding.evidence)}}
                for record, finding in zip(records, findings, strict=True)
            ],
            "causes": _causes(findings),
            "channels": [
                tag.removeprefix(CHANNELS_TAG)
                for tag in sorted(tags)
                if tag.startswith(CHANNELS_TAG)
            ],
            "problems": [problem for problem in problems if problem],
        }

    def stats(self, name: str, metric: str) -> Series:
        """Return one metric of all layers; values of shape ``(S, layers)``."""
        tags = self._tags(name)
        row = _place(metric, [known.key for known in _header(tags).metrics], "metric")
        series = self._stats(name, tags)
        return Series(series.steps, series.values[:, row])

    def layer(self, name: str, layer: str) -> Series:
        """Return all metrics of one layer; values of shape ``(S, metrics)``."""
        tags = self._tags(name)
        column = _place(layer, _header(tags).layers, "layer")
        series = self._stats(name, tags)
        return Series(series.steps, series.values[:, :, column])

    def channels(self, name: str, layer: str) -> Series:
        """Return the channel snapshots of one layer; values of shape ``(S, rows, C)``."""
        tags = self._tags(name)
        tag = CHANNELS_TAG + layer
        if tag not in tags:
            raise LogError(f"run {name} has no channel snapshot of layer {layer}")
        return self._keep(
            name,
            tag,
            tags,
            lambda: channel_series(self._events(name, tag), decode_rows(tags[tag].plugin_content)),
        )

    def _tags(self, name: str) -> Mapping[str, Any]:
        listed = self.provider.list_tensors(
            self.context,
            experiment_id=self.experiment,
            plugin_name=PLUGIN_NAME,
            run_tag_filter=provider_api.RunTagFilter(runs=[name]),
        )
        if name not in listed:
            if name in self.damages:
                raise LogError(self.damages[name])
            raise LogError(f"there is no run {name} that bnguard logged")
        tags: Mapping[str, Any] = listed[name]
        return tags

    def _stats(self, name: str, tags: Mapping[str, Any]) -> Series:
        header = _header(tags)
        return self._keep(
            name, STATS_TAG, tags, lambda: stats_series(self._events(name, STATS_TAG), header.shape)
        )

    def _keep(
        self, name: str, tag: str, tags: Mapping[str, Any], read: Callable[[], Series]
    ) -> Series:
        newest = (tags[tag].max_step, tags[tag].max_wall_time)
        return self.cache.get((self.experiment, name, tag, *newest), read)

    def _events(self, name: str, tag: str) -> list[Event]:
        try:
            return [Event.decode(*event) for event in self._raw_events(name, tag)]
        except Exception:  # Another provider, or another version of one.
            return self._convert_events(name, tag)

    def _raw_events(self, name: str, tag: str) -> Iterable[tuple[int, float, Any]]:
        """Yield step, time and protocol buffer of each event, from private attributes.

        The public ``read_tensors`` fails on all events if one is broken, and allocates whatever
        size an event claims.
        """
        multiplexer = getattr(self.provider, "_multiplexer", None)
        if multiplexer is not None:
            for event in multiplexer.Tensors(name, tag):
                yield event.step, event.wall_time, event.tensor_proto
            return
        request = data_provider_pb2.ReadTensorsRequest(experiment_id=self.experiment)
        request.plugin_filter.plugin_name = PLUGIN_NAME
        request.run_tag_filter.runs.names.append(name)
        request.run_tag_filter.tags.names.append(tag)
        request.downsample.num_points = _ALL_STEPS
        for run in self.provider._stub.ReadTensors(request).runs:
            for series in run.tags:
                yield from zip(
                    series.data.step, series.data.wall_time, series.data.value, strict=True
                )

    def _convert_events(self, name: str, tag: str) -> list[Event]:
        try:
            read = self.provider.read_tensors(
                self.context,
                experiment_id=self.experiment,
                plugin_name=PLUGIN_NAME,
                downsample=_ALL_STEPS,
                run_tag_filter=provider_api.RunTagFilter(runs=[name], tags=[tag]),
            )
        except (TypeError, ValueError, LookupError, MemoryError, OverflowError) as error:
            # What a tensor that contradicts itself leads to.
            raise LogError(f"a tensor of {tag} in run {name} is broken: {error}") from None
        return [
            Event(event.step, event.wall_time, event.numpy)
            for event in read.get(name, {}).get(tag, [])
        ]


class SeriesCache:
    """Keeps the series read last, so that a click does not read a run again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[_Key, Series] = {}

    def get(self, key: _Key, read: Callable[[], Series]) -> Series:
        """Return the series of the key; read it if it is not kept."""
        with self._lock:
            if key in self._series:
                self._series[key] = self._series.pop(key)
                return self._series[key]
        series = read()
        with self._lock:
            self._series[key] = series
            while len(self._series) > _MOST_SERIES_KEPT:
                del self._series[next(iter(self._series))]
        return series


@dataclass(frozen=True, eq=False)
class Event:
    """One event of a tag.

    Attributes:
        step: Training step.
        wall_time: When it was written, in seconds since the epoch.
        numpy: The tensor; an empty array, which fits nothing, if it cannot be read.
    """

    step: int
    wall_time: float
    numpy: npt.NDArray[Any]

    @classmethod
    def decode(cls, step: int, wall_time: float, tensor: Any) -> Event:
        """Return the event of a protocol buffer."""
        try:
            if math.prod(dim.size for dim in tensor.tensor_shape.dim) > MOST_VALUES_A_STEP:
                return cls(step, wall_time, np.zeros(0))
            return cls(step, wall_time, np.asarray(tensor_util.make_ndarray(tensor)))
        except Exception:  # Whatever a strange type, or a false shape, leads to.
            return cls(step, wall_time, np.zeros(0))


@dataclass(frozen=True, eq=False)
class Series:
    """Arrays of one shape, a step each.

    Attributes:
        steps: Ascending, each once; shape ``(S,)``, float64.
        values: Shape ``(S, …)``, float32.
        names: Names of the rows of a step, if they have any.
        left_out: Why events are missing; empty if none is.
    """

    steps: npt.NDArray[np.float64]
    values: npt.NDArray[np.float32]
    names: tuple[str, ...] = ()
    left_out: str = ""

    def pack(self, values: bytes | None = None) -> bytes:
        """Return the series as bytes that keep NaN and Inf.

        Little-endian: a uint32 with the length of the JSON that follows (``shape``, ``names``;
        padded, so that 8 divides what precedes the numbers), the steps as float64, the values as
        float32, unless they are given in another form.
        """
        head = json.dumps({"shape": self.values.shape, "names": self.names}).encode()
        head += b" " * (-(len(head) + 4) % 8)
        return b"".join(
            [
                len(head).to_bytes(4, "little"),
                head,
                self.steps.astype("<f8").tobytes(),
                self.values.astype("<f4").tobytes() if values is None else values,
            ]
        )


def _causes(findings: Sequence[Finding]) -> list[dict[str, list[int]]]:
    """Return the places of each root cause's findings, and of what they lead to."""
    places = {id(finding): place for place, finding in enumerate(findings)}

    def places_of(*groups: FindingGroup) -> list[int]:
        return [places[id(finding)] for group in groups for finding in group.findings]

    return [
        {"roots": places_of(root), "effects": places_of(*effects)}
        for root, effects in group_causes(findings).items()
    ]


def since(finding: Record, header: Header, series: Series) -> int | None:
    """Return the logged step since which a layer is beyond the limit of the finding's rule.

    A rule that judges the newest evaluation names its step; the layer may be off for longer.
    """
    steps: list[int] = []
    if finding["layer"] in header.layers:
        values = series.values[:, :, header.layers.index(finding["layer"])]
        for row, metric in enumerate(header.metrics):
            if metric.limit is None or metric.rules[:1] != (finding["code"],):
                continue
            known = np.flatnonzero(~np.isnan(values[:, row]))
            within = np.flatnonzero(~metric.is_over(values[known, row]))
            first = int(within[-1]) + 1 if within.size else 0
            steps += series.steps[known[first : first + 1]].astype(int).tolist()
    return min(steps, default=finding["step"])


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


def thin(series: Series, most_steps: int) -> Series:
    """Return at most this many steps: each is a bin, with its largest absolute values.

    A peak of a single step survives; a value is NaN only if its whole bin is NaN.

    >>> series = Series(np.arange(4.0), np.array([[0.0], [-9.0], [1.0], [2.0]], dtype=np.float32))
    >>> thin(series, 2).values.ravel().tolist()
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
        raise LogError(f"a tensor of shape {_in_words(shape)} a step is too large to be shown")
    events = list(events)
    fitting = [
        event for event in events if event.numpy.shape == shape and event.numpy.dtype.kind == "f"
    ]
    if not fitting:
        raise LogError(f"no event has the shape {_in_words(shape)} that was announced")
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


def _in_words(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _version(tags: Mapping[str, Any]) -> str:
    """Return a text that changes when anything was written."""
    return repr(max(series.max_wall_time for series in tags.values()))


def _header(tags: Mapping[str, Any]) -> Header:
    if STATS_TAG not in tags:
        raise LogError("the run has no bnguard/stats")
    return Header.decode(tags[STATS_TAG].plugin_content)


def _place(name: str, names: list[str] | tuple[str, ...], what: str) -> int:
    if name not in names:
        raise LogError(f"the run has no {what} {name}")
    return names.index(name)


def _state(metric: Metric, values: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, Any]:
    """Return the state of a metric over all steps: how many layers are, or were, over the limit."""
    over = metric.is_over(values)
    finite = np.abs(values[np.isfinite(values)])
    known = values[-1][~np.isnan(values[-1])]
    worst = known[_worst(metric, known)] if known.size else None
    return {
        "over_now": int(over[-1].sum()),
        "over_ever": int(over.any(axis=0).sum()),
        "worst_now": None if worst is None else json_number(float(worst)),
        "largest": json_number(float(finite.max())) if finite.size else None,
        "is_observed": not bool(np.isnan(values).all()),
    }


def _worst(metric: Metric, values: np.ndarray[Any, np.dtype[np.float32]]) -> int:
    return int(values.argmin() if metric.limit_side == "below" else np.abs(values).argmax())
