"""The content of an event file: tags, metrics, and the header that describes the tensors.

=========================== ======================================= =======================
tag                         tensor                                  when
=========================== ======================================= =======================
``bnguard/stats``           float32 ``[metrics, layers]``; the      each logged step
                            first event carries a :class:`Header`
``bnguard/findings``        string, a JSON list, all findings so    when they change
                            far
``bnguard/channels/LAYER``  float16 ``[CHANNEL_ROWS, C]``           now and then, and when a
                                                                    finding fires
=========================== ======================================= =======================

NaN means not observed; an infinite value was measured.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from bnguard.errors import BNGuardError
from bnguard.rules import RULES, Rule

PLUGIN_NAME = "bnguard"
SCHEMA = 1
STATS_TAG = "bnguard/stats"
FINDINGS_TAG = "bnguard/findings"
CHANNELS_TAG = "bnguard/channels/"

# Derived numbers, not raw moments: half precision keeps a shift of 0.1 σ next to a mean of 1000,
# but not the difference of two means.
CHANNEL_ROWS = (
    "batch_shift_std",
    "batch_log_variance_ratio",
    "eval_shift_std",
    "eval_log_variance_ratio",
    "running_mean",
    "running_std",
    "gamma",
    "beta",
    "is_dead",
)

# A log directory is untrusted: beyond these a header is refused.
_MOST_LAYERS = 20_000
_MOST_METRICS = 64

LimitSide = Literal["above", "below", "either"]


class LogError(BNGuardError):
    """A log directory without bnguard data, or with data that cannot be shown."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number per layer and logged step.

    Attributes:
        key: Name in tags and links.
        name: Name for people.
        description: What it is, in one sentence.
        unit: Unit of the values; empty for a plain number.
        panel: Title of the chart that shows its curve with related ones; empty for one of its own.
        limit: Limit of a rule, if any.
        limit_side: The faulty side of the limit; ``either`` is for the absolute value.
        rules: Codes of the rules that use it; the one that sets the limit first.
        has_quantiles: Whether its quantiles over the layers are written as scalars.

    Example:
        >>> shift = Metric(key="s", name="Shift", description="", limit=1.0)
        >>> shift.is_over(np.array([0.5, -2.0, np.inf, np.nan])).tolist()
        [False, False, True, False]
    """

    key: str
    name: str
    description: str
    unit: str = ""
    panel: str = ""
    limit: float | None = None
    limit_side: LimitSide = "above"
    rules: tuple[str, ...] = ()
    has_quantiles: bool = True

    def is_over(self, values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.bool_]:
        """Return which values are on the wrong side of the limit; none without one."""
        if self.limit is None:
            return np.zeros(values.shape, dtype=bool)
        if self.limit_side == "below":
            return np.asarray(values < self.limit)
        return np.asarray((np.abs(values) if self.limit_side == "either" else values) > self.limit)


def standard_metrics(rules: Iterable[Rule] = RULES) -> tuple[Metric, ...]:
    """Return the metrics that bnguard logs, with the limits of the rules in force.

    >>> [metric.limit for metric in standard_metrics() if metric.key == "eval_shift_std"]
    [1.0]
    >>> [metric.limit for metric in standard_metrics([]) if metric.key == "eval_shift_std"]
    [None]
    """
    rules = tuple(rules)
    limits = {f"{rule.code}.{name}": value for rule in rules for name, value in vars(rule).items()}
    # Of a value that is relative to the limit of its rule.
    limits |= {rule.code: 1.0 for rule in rules}
    return tuple(
        dataclasses.replace(metric, limit=limits.get(_LIMITS.get(metric.key, "")))
        for metric in _METRICS
    )


_METRICS = (
    Metric(
        key="eval_shift_std",
        name="Eval shift",
        unit="σ",
        description="Distance of the mean in eval mode from the running mean, in running "
        "standard deviations; nine of ten channels are below.",
        panel="Shift of the mean",
        rules=("BN301", "BN302", "BN303", "BN305"),
    ),
    Metric(
        key="eval_log_variance_ratio",
        name="Eval variance",
        description="Running variance against the variance in eval mode, as a factor "
        "(logged as a logarithm).",
        panel="Running variance, as a factor",
        limit_side="either",
        rules=("BN301", "BN302", "BN303", "BN305"),
    ),
    Metric(
        key="batch_shift_std",
        name="Batch shift",
        unit="σ",
        description="Distance of the mean of the training batch from the running mean, in "
        "running standard deviations.",
        panel="Shift of the mean",
        rules=("BN202", "BN203"),
    ),
    Metric(
        key="batch_log_variance_ratio",
        name="Batch variance",
        description="Running variance against the variance of the training batch, as a factor "
        "(logged as a logarithm).",
        panel="Running variance, as a factor",
        limit_side="either",
        rules=("BN202",),
    ),
    Metric(
        key="variance_kept",
        name="Variance kept",
        description="Share of a channel's variance that lies within a batch; the rest is removed "
        "by normalising.",
        limit_side="below",
        rules=("BN201",),
    ),
    Metric(
        key="values_per_channel",
        name="Values per channel",
        description="n, samples times positions: what the mean and variance of a batch are "
        "estimated from.",
        limit_side="below",
        rules=("BN201", "BN102", "BN106", "BN107"),
    ),
    Metric(
        key="gain",
        name="Gain",
        description="Largest |gamma| / sqrt(running_var + eps): what one unit at the input becomes "
        "in eval mode.",
        rules=("BN403", "BN404"),
    ),
    Metric(
        key="dead_channel_share",
        name="Dead channels",
        description="Share of the channels that have no variance.",
        rules=("BN204",),
    ),
    Metric(
        key="batch_mean",
        name="Batch mean",
        description="Mean of the training batch, averaged over the channels.",
        panel="Mean",
        has_quantiles=False,
    ),
    Metric(
        key="running_mean",
        name="Running mean",
        description="Running mean, averaged over the channels.",
        panel="Mean",
        rules=("BN401", "BN402"),
        has_quantiles=False,
    ),
    Metric(
        key="batch_std",
        name="Batch deviation",
        description="Standard deviation of the training batch, averaged over the channels.",
        panel="Standard deviation",
        has_quantiles=False,
    ),
    Metric(
        key="running_std",
        name="Running deviation",
        description="Square root of the running variance, averaged over the channels.",
        panel="Standard deviation",
        has_quantiles=False,
    ),
    Metric(
        key="frozen_moved_std",
        name="Moved while frozen",
        unit="σ",
        description="Largest distance of the running mean from where it was at the start, of "
        "layers whose gamma and beta are frozen; the others are not observed.",
        rules=("BN101",),
        has_quantiles=False,
    ),
    Metric(
        key="data_order",
        name="Data order",
        description="How much training batches differ at the input of the model, relative to the "
        "limit of BN203: sorted or grouped data are above 1. Shown at the first layer.",
        rules=("BN203",),
        has_quantiles=False,
    ),
)

_LIMITS = {
    "eval_shift_std": "BN301.max_shift_std",
    "eval_log_variance_ratio": "BN301.max_log_variance_ratio",
    "variance_kept": "BN201.min_within_batch_share",
    "values_per_channel": "BN201.min_values_per_channel",
    "gain": "BN403.max_gain",
    "dead_channel_share": "BN204.max_dead_share",
    "frozen_moved_std": "BN101.max_updates",
    "data_order": "BN203",
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """Describes the tensors of a run; written once.

    Attributes:
        layers: Names in forward order: the columns of a tensor.
        metrics: The rows of a tensor.
        kinds: Class name of each layer; empty if not logged.
    """

    layers: tuple[str, ...]
    metrics: tuple[Metric, ...]
    kinds: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the tensor of one step: metrics, layers."""
        return (len(self.metrics), len(self.layers))

    def encode(self) -> bytes:
        """Return the header as JSON."""
        return json.dumps({"schema": SCHEMA, **dataclasses.asdict(self)}).encode()

    @classmethod
    def decode(cls, content: bytes) -> Header:
        """Return the header from the first event of a run.

        Raises:
            LogError: It is not readable, of another schema version, or too large.

        Example:
            >>> header = Header(layers=("bn1",), metrics=standard_metrics())
            >>> Header.decode(header.encode()) == header
            True
        """
        try:
            raw = json.loads(content)
            schema = raw["schema"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise LogError("the header of bnguard/stats is not readable") from None
        if schema != SCHEMA:
            raise LogError(
                f"the log has schema version {str(schema)!r:.20}, and this bnguard reads version "
                f"{SCHEMA}: open it with the version that wrote it"
            )
        try:
            header = cls(
                layers=_texts(raw["layers"]),
                metrics=tuple(_metric(metric) for metric in raw["metrics"]),
                kinds=_texts(raw.get("kinds", [])),
            )
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            raise LogError("the header of bnguard/stats lacks layers or metrics") from None
        if len(header.layers) > _MOST_LAYERS or len(header.metrics) > _MOST_METRICS:
            raise LogError(
                f"the header names {len(header.layers)} layers and {len(header.metrics)} metrics: "
                f"more than {_MOST_LAYERS} or {_MOST_METRICS} are not shown"
            )
        if len({metric.key for metric in header.metrics}) < len(header.metrics):
            raise LogError("the header names a metric twice")
        return header


def encode_rows(rows: Iterable[str]) -> bytes:
    """Return the names of the rows of a channel snapshot as JSON, for its first event."""
    return json.dumps({"schema": SCHEMA, "rows": list(rows)}).encode()


def decode_rows(content: bytes) -> tuple[str, ...]:
    """Return the names of the rows of a channel snapshot.

    Raises:
        LogError: They are not readable, or of another schema version.

    Example:
        >>> decode_rows(encode_rows(["gamma", "beta"]))
        ('gamma', 'beta')
    """
    try:
        raw = json.loads(content)
        rows = _texts(raw["rows"]) if raw["schema"] == SCHEMA else ()
    except (ValueError, TypeError, KeyError, RecursionError):
        rows = ()
    if not rows or len(rows) > _MOST_METRICS:
        raise LogError(f"the channel rows are not those of schema version {SCHEMA}")
    return rows


def _texts(raw: object) -> tuple[str, ...]:
    if not isinstance(raw, list) or not all(isinstance(text, str) for text in raw):
        raise TypeError("not a list of strings")
    return tuple(raw)


def _metric(raw: dict[str, Any]) -> Metric:
    limit, side = raw.get("limit"), raw.get("limit_side", "above")
    if side not in get_args(LimitSide) or not (limit is None or math.isfinite(limit)):
        raise ValueError("no such limit")
    return Metric(
        key=str(raw["key"]),
        name=str(raw.get("name", raw["key"])),
        unit=str(raw.get("unit", "")),
        description=str(raw.get("description", "")),
        panel=str(raw.get("panel", "")),
        limit=None if limit is None else float(limit),
        limit_side=side,
        rules=_texts(raw.get("rules", [])),
        has_quantiles=bool(raw.get("has_quantiles", True)),
    )
