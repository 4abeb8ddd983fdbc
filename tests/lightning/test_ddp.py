"""Two real processes under DDP."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "ddp_run.py"


def train(folder, case):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), case],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    paths = sorted(folder.glob("rank*.pickle"))
    return done, [pickle.loads(path.read_bytes()) for path in paths]


@pytest.mark.parametrize("case", ["broadcast", "apart"])
def test_each_rank_reads_its_own_batches_and_the_findings_are_merged(case, tmp_path):
    """With ``broadcast``, DDP puts rank 0's buffers in place of a rank's own at each forward."""
    done, ranks = train(tmp_path, case)
    assert done.returncode == 0, done.stderr
    for rank in ranks:
        read = torch.from_numpy(rank["read"])
        torch.testing.assert_close(read, rank["true"], rtol=1e-4, atol=1e-4)
    assert (ranks[0]["true"] - ranks[1]["true"]).abs().max() > 0.5

    assert "bnguard · watching 1 BN layers on each of 2 ranks" in done.stdout
    assert done.stdout.count("bnguard · 1 BN layer ") == 1
    assert len(list(tmp_path.rglob("bnguard-report.json"))) == 1
    assert ranks[0]["plan"] == 2
    assert ranks[0]["findings"] == ranks[1]["findings"]
    codes = {finding["code"] for finding in ranks[0]["findings"]}
    assert "BN303" in codes
    assert "BN203" not in codes
    assert ("BN210" in codes) is (case == "apart")


def test_a_fault_of_one_rank_says_whose_it_is_and_stops_all(tmp_path):
    done, ranks = train(tmp_path, "poison")
    assert done.returncode == 0, done.stderr
    assert "bnguard: error: BN401 non-finite-batch at net.1, step 6: on rank 1: " in done.stdout
    assert "stopping the trainer because of BN401" in done.stdout
    # The NaN comes in step 6; the ranks talk every fourth.
    assert ranks[0]["steps"] == ranks[1]["steps"] == 8


def test_an_error_of_our_own_on_one_rank_stops_nobody(tmp_path):
    done, ranks = train(tmp_path, "ours")
    assert done.returncode == 0, done.stderr
    assert [rank["is_off"] for rank in ranks] == [False, True]
    assert ranks[0]["steps"] == 24
    assert "bnguard · 1 BN layer " in done.stdout


def test_a_rank_that_raises_leaves_none_waiting(tmp_path):
    done, _ = train(tmp_path, "raises")
    assert done.returncode != 0
    assert "out of cheese" in done.stderr


def test_recalibration_is_the_same_on_all_ranks(tmp_path):
    done, ranks = train(tmp_path, "recalibration")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("1 BN layers recalibrated on 192 samples before validation") == 2
    first, second = (rank["state"] for rank in ranks)
    assert torch.equal(first["net.1.running_mean"], second["net.1.running_mean"])
    assert torch.equal(first["net.1.running_var"], second["net.1.running_var"])
