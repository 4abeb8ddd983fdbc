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


def test_batches_are_read_right_where_ddp_broadcasts_the_buffers(tmp_path):
    """Each rank's batches have a mean of their own, though all start from rank 0's buffers."""
    _, ranks = train(tmp_path, "means")
    for rank in ranks:
        read = torch.from_numpy(rank["read"])
        torch.testing.assert_close(read, rank["true"], rtol=1e-4, atol=1e-4)
    assert (ranks[0]["true"] - ranks[1]["true"]).abs().max() > 0.5


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
