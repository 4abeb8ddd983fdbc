"""How diagnoses print themselves, and what they are as JSON."""

import json
import math

import pytest
import torch
from torch import nn

import bnguard
from bnguard.whatif.result import Diagnosis, LayerShare, Row, Verdict


def diagnosis(**changes):
    cause = Verdict(
        name="stale-statistics",
        message="the running statistics are not those of the weights",
        evidence=("score 0.5 as they are, 0.9 recalibrated on training data",),
        advice="recalibrate on training data",
        next_step="bnguard recalibrate " + "long/" * 12 + "last.ckpt --model a.B --split train",
        cured_by="reference",
    )
    content = {
        "rows": (
            Row(name="stored", label="as they are", score=0.5, change=math.inf, gap=1.25,
                flipped_share=0.375, drift_std=math.nan, drift_layer="a"),
            Row(name="batches of 8", label="of each batch of 8", change=0.001, gap=12345.0),
        ),
        "cause": cause,
        "layers": tuple(
            LayerShare(f"backbone.stage{i}." + "deep." * 9 + "bn", share, 0.5, -1.0)
            for i, share in enumerate((0.9, 0.104, 0.001, -0.001, None, 0.0))
        ),
        "skipped": (),
        "samples": 1200,
        "reference_samples": 0,
        "notes": ("the score is val_accuracy",),
    }  # fmt: skip
    return Diagnosis(**(content | changes))


def test_it_fits_80_columns_and_the_next_step_can_be_pasted():
    text = str(diagnosis())
    *lines, command = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert command == diagnosis().cause.next_step
    assert text.splitlines()[0] == "bnguard · 1,200 evaluation samples"
    assert "and 1 more layer" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["as", "they", "are", "0.5", "37.5%", "inf", "1.25", "nan", "–"] in rows
    assert ["of", "each", "batch", "of", "8", "–", "–", "0.00", "1.2e+04", "–", "–"] in rows
    assert any(line[-3:] == ["0%", "0.5", "2.7×"] for line in rows)  # and no -0 %


def test_without_a_score_or_classes_there_are_no_such_columns():
    rows = (Row(name="stored", label="as they are", change=0.5),)
    header = str(diagnosis(rows=rows)).splitlines()[1]
    assert header.split() == ["statistics", "change", "gap", "drift", "first"]


def test_its_repr_is_one_line():
    assert repr(diagnosis()) == "Diagnosis(cause='stale-statistics', rows=2, samples=1200)"


def test_a_real_one_is_strict_json_with_its_schema():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[1].running_mean[0] = torch.nan
    found = bnguard.diagnose(model, torch.randn(64, 4).split(8))
    document = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert list(document) == [
        "schema",
        "bnguard",
        "samples",
        "reference_samples",
        "cause",
        "rows",
        "layers",
        "skipped",
        "notes",
    ]
    assert document["schema"] == 1
    assert document["cause"]["name"] == "poisoned-statistics"
    assert document["rows"][0]["change"] == "Infinity"
    assert document["layers"][0]["shift_std"] is None
    assert max(map(len, str(found).splitlines())) <= 80


@pytest.mark.parametrize("is_fault", [True, False])
def test_the_cause_is_named_where_there_is_one(is_fault):
    cause = Verdict(name="none", message="m", is_fault=is_fault, advice="a", next_step="b")
    assert ("no fault found: m" in str(diagnosis(cause=cause))) is not is_fault
