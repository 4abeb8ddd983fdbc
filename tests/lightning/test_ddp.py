"""Two real processes under DDP, with Lightning and in a plain loop."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of all cases, which one process runs: to start one takes longer than they do."""
    folder = tmp_path_factory.mktemp("ddp")
    done = subprocess.run(
        [sys.executable, "-m", "tests.lightning.ddp_run", str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def case(folder):
    def read(name):
        texts = [(folder / name / f"rank{rank}.txt").read_text() for rank in range(2)]
        statuses = pickle.loads((folder / name / "statuses.pickle").read_bytes())
        paths = sorted((folder / name).glob("rank*.pickle"))
        ranks = [pickle.loads(path.read_bytes()) for path in paths]
        return SimpleNamespace(
            folder=folder / name, ranks=ranks, statuses=statuses, texts=texts, text="".join(texts)
        )

    return read


@pytest.mark.parametrize("name", ["broadcast", "apart"])
def test_each_rank_reads_its_own_batches_and_the_findings_are_merged(name, case):
    """With ``broadcast``, DDP puts rank 0's buffers in place of a rank's own at each forward."""
    run = case(name)
    assert run.statuses == [0, 0], run.text
    for rank in run.ranks:
        read = torch.from_numpy(rank["read"])
        torch.testing.assert_close(read, rank["true"], rtol=1e-4, atol=1e-4)
    assert (run.ranks[0]["true"] - run.ranks[1]["true"]).abs().max() > 0.5

    assert "bnguard · watching 1 BN layer on each of 2 ranks" in run.texts[0]
    assert run.texts[0].count("bnguard · 1 BN layer ") == 1
    assert "bnguard" not in run.texts[1]
    assert len(list(run.folder.rglob("bnguard-report.json"))) == 1
    assert run.ranks[0]["plan"] == 2
    assert run.ranks[0]["findings"] == run.ranks[1]["findings"]
    codes = {finding["code"] for finding in run.ranks[0]["findings"]}
    # The broadcast statistics of rank 0 fit its evaluation, however few their updates were.
    assert ("BN303" in codes) is (name == "apart")
    assert "BN203" not in codes
    assert ("BN210" in codes) is (name == "apart")


def test_a_fault_of_one_rank_says_whose_it_is_and_stops_all(case):
    run = case("poison")
    assert run.statuses == [0, 0], run.text
    assert "bnguard: error: BN401 non-finite-batch at net.1, step 6\n  on rank 1: " in run.texts[0]
    assert "stopping the trainer because of BN401" in run.texts[0]
    # The NaN comes in step 6; the ranks talk every fourth.
    assert [rank["steps"] for rank in run.ranks] == [8, 8]


def test_an_error_of_our_own_on_one_rank_stops_nobody(case):
    run = case("ours")
    assert run.statuses == [0, 0], run.text
    assert [rank["is_off"] for rank in run.ranks] == [False, True]
    assert [rank["steps"] for rank in run.ranks] == [24, 24]
    assert run.texts[1].count("bnguard: an error of its own, AttributeError") == 1
    assert "bnguard · 1 BN layer " in run.texts[0]


def test_a_rank_that_raises_leaves_none_waiting(case):
    run = case("raises")
    assert all(run.statuses)
    assert "out of cheese" in run.texts[1]
    assert "an error of its own" not in run.text


def test_a_callback_on_rank_zero_alone_leaves_none_waiting(case):
    run = case("rank zero alone")
    assert run.statuses == [0, 0], run.text
    assert [rank["steps"] for rank in run.ranks] == [24, 24]
    assert "bnguard · 1 BN layer " in run.texts[0]


def test_recalibration_is_the_same_on_all_ranks(case):
    run = case("recalibration")
    assert run.statuses == [0, 0], run.text
    told = "1 BN layer recalibrated on 192 samples before validation"
    assert run.texts[0].count(told) == 1
    assert "recalibrated 2 times before validation, new statistics kept" in run.texts[0]
    first, second = (rank["state"] for rank in run.ranks)
    assert torch.equal(first["net.1.running_mean"], second["net.1.running_mean"])
    assert torch.equal(first["net.1.running_var"], second["net.1.running_var"])


def test_a_plain_loop_compares_the_ranks_where_all_are_asked(case):
    run = case("plain loop")
    assert run.statuses == [0, 0], run.text
    for rank in run.ranks:
        assert rank["skipped"] == ["the ranks were not compared"]
        assert "BN210" not in rank["alone"]
        assert {"BN106", "BN210"} <= {finding["code"] for finding in rank["findings"]}
    assert run.ranks[0]["findings"] == run.ranks[1]["findings"]


def test_with_sharded_parameters_the_statistics_are_watched(case):
    run = case("sharded")
    assert run.statuses == [0, 0], run.text
    for rank in run.ranks:
        assert ["part of gamma and beta alone" in text for text in rank["warned"]] == [True]
        assert rank["updates"] == 12
        assert rank["evaluated"]
        assert "BN304" not in rank["codes"]
