"""Events of a log that nobody vouches for, as arrays in the order of steps."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnguard.tensorboard.metadata import Header, LogError, decode_rows
from bnguard.tensorboard.reader import (
    Series,
    channel_series,
    newest_findings,
    stats_series,
    thin,
)
from bnguard.tensorboard.records import decode_findings, encode_findings, finding_record

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def event(step, values, wall_time=0.0):
    return SimpleNamespace(step=step, wall_time=wall_time, numpy=np.asarray(values))


def test_steps_are_sorted_and_the_newest_of_each_is_kept():
    events = [
        event(2, [[2.0]], 1),
        event(1, [[1.0]], 2),
        event(2, [[3.0]], 5),
        event(2, [[9.0]], 3),
    ]
    series = stats_series(events, (1, 1))
    assert series.steps.tolist() == [1, 2]
    assert series.values.ravel().tolist() == [1.0, 3.0]


def test_what_has_another_shape_or_kind_is_left_out_and_told():
    events = [event(1, [[1.0]]), event(2, [[1.0, 2.0]]), event(3, [[b"x"]])]
    series = stats_series(events, (1, 1))
    assert series.steps.tolist() == [1]
    assert series.left_out == "2 events were left out: of another shape or type, or damaged"


def test_nothing_that_fits_is_refused():
    with pytest.raises(LogError, match=r"no event has the shape \[2, 2\]"):
        stats_series([event(1, [[1.0]])], (2, 2))


def test_a_monstrous_shape_is_refused():
    with pytest.raises(LogError, match="too large"):
        stats_series([], (64, 1_000_000))


def test_channels_follow_the_newest_snapshot():
    events = [event(1, np.zeros((2, 3))), event(2, np.zeros((2, 5)))]
    series = channel_series(events, ("gamma", "beta"))
    assert series.values.shape == (1, 2, 5)
    damaged = channel_series([*events, event(3, np.zeros(0))], ("gamma", "beta"))
    assert damaged.values.shape == (1, 2, 5)
    with pytest.raises(LogError, match="the 3 rows that were announced"):
        channel_series(events, ("a", "b", "c"))
    with pytest.raises(LogError):
        channel_series([], ("a",))


def test_the_findings_written_last_count_even_at_an_earlier_step():
    events = [
        event(100, np.array([encode_findings([{"code": "OLD"}])], dtype=object), 1.0),
        event(50, np.array([encode_findings([{"code": "NEW"}])], dtype=object), 2.0),
    ]
    findings, problem = newest_findings(events)
    assert ([finding["code"] for finding in findings], problem) == (["NEW"], "")
    assert newest_findings([]) == ([], "")


@pytest.mark.parametrize("text", [b"{}", b"not json", b"[" * 100_000, b"\xff"])
def test_of_findings_that_are_not_readable_the_ones_before_are_shown(text):
    broken = event(7, np.array([text], dtype=object), 2.0)
    findings, problem = newest_findings([broken])
    assert findings == []
    assert problem.startswith("the findings of step 7 are not readable: ")
    sound = event(5, np.array([encode_findings([{"code": "OLD"}])], dtype=object), 1.0)
    findings, problem = newest_findings([sound, broken])
    assert [finding["code"] for finding in findings] == ["OLD"]
    assert problem


def test_thinning_keeps_the_peak_and_what_is_not_finite():
    values = np.zeros((1000, 1, 2), dtype=np.float32)
    values[503] = -7.0
    values[700] = np.inf
    values[:100] = np.nan
    series = thin(Series(np.arange(1000.0), values), 10)
    assert series.values.shape == (10, 1, 2)
    assert np.isnan(series.values[0]).all()
    assert series.values[5].tolist() == [[-7.0, -7.0]]
    assert np.isinf(series.values[7]).all()
    assert series.steps[-1] == 999


def test_the_name_of_a_repair_becomes_its_command():
    record = finding_record({"fix": {"summary": "s", "repair": "recalibrate"}})
    assert record["fix"]["command"].startswith("bnguard recalibrate CKPT")
    record = finding_record({"fix": {"repair": "recalibrate", "command": "make it so"}})
    assert record["fix"]["command"] == "make it so"


@given(ANYTHING)
def test_any_finding_becomes_a_record(raw):
    record = finding_record(raw if isinstance(raw, dict) else {"evidence": raw, "layers": raw})
    assert decode_findings(encode_findings([record])) == [record]


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": "bn"},
        {"layers": ["bn", 3]},
        {"metrics": ["gain"]},
        {"metrics": [{}]},
        {"metrics": [{"key": "a", "limit": float("nan")}]},
        {"metrics": [{"key": "a", "limit": 10**400}]},
        {"metrics": [{"key": "a", "limit_side": "left"}]},
        {"metrics": [{"key": "a"}, {"key": "a"}]},
    ],
)
def test_a_header_that_is_odd_in_one_place_is_refused(fields):
    sound = {"schema": 1, "layers": ["bn"], "metrics": [{"key": "a"}]}
    assert Header.decode(json.dumps(sound).encode()).layers == ("bn",)
    with pytest.raises(LogError):
        Header.decode(json.dumps(sound | fields).encode())


@given(st.binary() | ANYTHING.map(lambda raw: repr(raw).replace("'", '"').encode()))
def test_any_header_is_read_or_refused(content):
    for decode in (Header.decode, decode_rows):
        with contextlib.suppress(LogError):
            decode(content)
