"""Reads runs through TensorBoard's data provider: what the tab and the page in one file show."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tensorboard.data import provider as provider_api  # type: ignore[import-untyped]

from bnguard.tensorboard.decoding import (
    Event,
    Series,
    channel_series,
    newest_findings,
    stats_series,
)
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
from bnguard.tensorboard.records import json_number

# More than TensorBoard was asked to keep: whatever it has.
_ALL_STEPS = 1_000_000
_MOST_SERIES_KEPT = 8

_Key = tuple[object, ...]


class SeriesCache:
    """Keeps the series read last, so that a click does not read a run again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._series: dict[_Key, Series] = {}

    def get(self, key: _Key, read: Callable[[], Series]) -> Series:
        """Return the series of the key, and read it where it is not kept."""
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
class LogReader:
    """Reads the runs of one experiment for one request.

    Attributes:
        provider: TensorBoard's data provider.
        context: Its request context, which may hold who asks.
        experiment: Its experiment id.
        cache: Outlives the request.
    """

    provider: Any
    context: Any
    experiment: str
    cache: SeriesCache

    def runs(self) -> list[dict[str, Any]]:
        """Return the runs that bnguard logged, each with its newest step or its problem."""
        listed = self.provider.list_tensors(
            self.context, experiment_id=self.experiment, plugin_name=PLUGIN_NAME
        )
        return [_listed(name, tags) for name, tags in sorted(listed.items())]

    def run(self, name: str) -> dict[str, Any]:
        """Return what a run is: layers, metrics, steps, findings, which channels are known.

        Raises:
            LogError: There is no such run, or it cannot be shown; as for the other methods.
        """
        tags = self._tags(name)
        header, series = _header(tags), self._stats(name, tags)
        problems = [series.left_out] if series.left_out else []
        try:
            findings = newest_findings(
                self._events(name, FINDINGS_TAG) if FINDINGS_TAG in tags else []
            )
        except LogError as error:
            findings = []
            problems.append(str(error))
        return {
            "name": name,
            "version": _version(tags),
            "layers": header.layers,
            "kinds": header.kinds,
            "metrics": [
                {**asdict(metric), **_standing(metric, series.values[:, row])}
                for row, metric in enumerate(header.metrics)
            ],
            "steps": len(series.steps),
            "first_step": series.steps[0],
            "last_step": series.steps[-1],
            "findings": findings,
            "channels": [
                tag.removeprefix(CHANNELS_TAG)
                for tag in sorted(tags)
                if tag.startswith(CHANNELS_TAG)
            ],
            "problems": problems,
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
        return self._kept(
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
            raise LogError(f"there is no run {name} that bnguard logged")
        tags: Mapping[str, Any] = listed[name]
        return tags

    def _stats(self, name: str, tags: Mapping[str, Any]) -> Series:
        header = _header(tags)
        return self._kept(
            name, STATS_TAG, tags, lambda: stats_series(self._events(name, STATS_TAG), header.shape)
        )

    def _kept(
        self, name: str, tag: str, tags: Mapping[str, Any], read: Callable[[], Series]
    ) -> Series:
        newest = (tags[tag].max_step, tags[tag].max_wall_time)
        return self.cache.get((self.experiment, name, tag, *newest), read)

    def _events(self, name: str, tag: str) -> list[Event]:
        try:
            read = self.provider.read_tensors(
                self.context,
                experiment_id=self.experiment,
                plugin_name=PLUGIN_NAME,
                downsample=_ALL_STEPS,
                run_tag_filter=provider_api.RunTagFilter(runs=[name], tags=[tag]),
            )
        except (TypeError, ValueError, MemoryError, OverflowError) as error:
            # What a tensor that contradicts itself leads to.
            raise LogError(f"a tensor of {tag} in run {name} is broken: {error}") from None
        return list(read.get(name, {}).get(tag, []))


def _listed(name: str, tags: Mapping[str, Any]) -> dict[str, Any]:
    try:
        _header(tags)
    except LogError as error:
        return {"name": name, "version": _version(tags), "problem": str(error)}
    return {"name": name, "version": _version(tags), "problem": ""}


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


def _standing(metric: Metric, values: np.ndarray[Any, np.dtype[np.float32]]) -> dict[str, Any]:
    """Return how a metric stands over all steps and layers: how many layers are, or were, over."""
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
