"""Recalibration in a Trainer with ddp: the callback, and ``recalibrate`` called by the user."""

import copy
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bnguard

SCRIPT = Path(__file__).with_name("recalibration_ddp_run.py")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3])
def test_all_ranks_end_with_the_statistics_of_all_samples(ranks, tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(ranks)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(ranks)]
    run = runpy.run_path(str(SCRIPT))
    alone = run["Net"]()
    alone.load_state_dict(copy.deepcopy(found[0][0]))
    truth = bnguard.recalibrate(alone, [run["data"]().tensors[0]], samples=1000)
    for state, by_callback in found:
        for name, statistics in truth.after.items():
            for kind, value in (("mean", statistics.mean), ("var", statistics.var)):
                expected = torch.from_numpy(value)
                mine = state[f"{name}.running_{kind}"]
                assert torch.equal(mine, found[0][0][f"{name}.running_{kind}"])
                assert torch.allclose(mine.double(), expected, rtol=1e-5, atol=1e-5)
                called_back = torch.from_numpy(by_callback[name][kind == "var"])
                assert torch.allclose(called_back, expected, rtol=1e-5, atol=1e-5)
