"""How recalibrations print themselves, and when a progress bar shows."""

import io
import json
import sys
import threading

import pytest
import torch
from rich.console import Console
from torch import nn

import bnguard
from bnguard.report.terminal import CalibrationBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def blocks(count):
    return nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(count)))


def test_one_line_per_layer_the_furthest_move_first():
    model = blocks(3)
    model[1].running_mean.fill_(3.0)
    result = bnguard.recalibrate(model, torch.randn(128, 4).split(10))
    heading, title, columns, *lines, gap = str(result).splitlines()
    assert heading == "recalibrated · exact · 3 BN layers · 128 samples · 13 batches"
    assert title == "How far the statistics moved, the furthest first"
    assert columns.split() == ["layer", "n", "shift,", "σ", "variance", "off", "by"]
    assert [line.split()[0] for line in lines] == ["1", "0", "2"]
    assert lines[0].split()[1:3] == ["128", "3"]
    assert float(gap.split()[2]) == pytest.approx(3.0, abs=0.5)


def test_many_layers_are_cut_short_and_fit_the_width():
    result = bnguard.recalibrate(blocks(14), torch.randn(128, 4).split(10))
    lines = str(result).splitlines()
    assert lines[-2] == "and 4 more layers"
    assert len(lines) == 15
    console = Console(file=io.StringIO(), width=40)
    console.print(result)
    assert max(map(len, console.file.getvalue().splitlines())) <= 40


def test_what_was_skipped_and_why_and_what_was_not_finite():
    model = blocks(4).train()
    model[0].eval()
    model[1].eval()
    model[2].running_var.fill_(float("nan"))
    text = str(bnguard.recalibrate(model, torch.randn(128, 4).split(10)))
    assert "skipped: 0 (and 1 more like it) is in eval mode while the model is in train" in text
    assert "was not finite" in text


def test_the_score_and_the_verdict():
    scores = iter([0.75, 0.5])
    result = bnguard.recalibrate(
        blocks(1), torch.randn(128, 4).split(10), score=lambda _: next(scores)
    )
    lines = str(result).splitlines()
    assert lines[0].startswith("not recalibrated · exact")
    assert lines[-2:] == [
        "score 0.75 → 0.5: rolled back",
        "note: the score is worse with the new statistics",
    ]


def test_the_document_is_plain_data_and_the_repr_one_line():
    model = blocks(3).train()
    model[0].eval()
    model[1].running_mean.fill_(float("nan"))
    result = bnguard.recalibrate(model, torch.randn(128, 4).split(10), score=lambda _: 0.5)
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document["kept"] is True
    assert (document["samples"], document["batches"], document["method"]) == (128, 13, "exact")
    assert document["score_before"] == document["score_after"] == 0.5
    assert document["mode_gap_before"] is None
    assert document["mode_gap_after"] == result.mode_gap_after.relative_change
    assert [layer["max_shift_std"] is None for layer in document["layers"]] == [True, False]
    assert document["skipped"][0]["name"] == "0"
    assert document["notes"] == list(result.notes)
    assert repr(result) == (
        "Recalibration(method='exact', layers=2, skipped=1, samples=128, is_kept=True)"
    )


def test_a_bar_says_samples_layers_and_the_time_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("bnguard.report.terminal._LONG_SECONDS", 0.0)
    with CalibrationBar() as bar:
        bar.start(samples=1024, layers=4)
        threads = [threading.Thread(target=bar.advance, args=(512,)) for _ in range(4)]
        for thread in threads:
            thread.start()
            thread.join()
    shown = sys.stderr.getvalue()
    assert "1,024 samples" in shown
    assert "layer 3/4" in shown


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_a_terminal_shows_the_bar_on_long_work_and_a_pipe_does_not(monkeypatch, method):
    for long_seconds, stream, options, is_shown in (
        (0.0, Terminal(), {}, True),
        (0.0, Terminal(), {"progress": False}, False),
        (0.0, io.StringIO(), {}, False),
        (1e9, Terminal(), {}, False),
    ):
        monkeypatch.setattr("bnguard.report.terminal._LONG_SECONDS", long_seconds)
        monkeypatch.setattr(sys, "stderr", stream)
        bnguard.recalibrate(blocks(2), torch.randn(24, 4).split(12), method=method, **options)
        assert ("recalibrating" in stream.getvalue()) is is_shown
