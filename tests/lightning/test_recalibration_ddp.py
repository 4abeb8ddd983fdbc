"""Recalibration in a Trainer with ddp: the callback, and ``recalibrate`` called by the user."""

import copy
import runpy
from pathlib import Path

import pytest
import torch

import bnguard
from tests.cli.running import on_ranks

SCRIPT = Path(__file__).with_name("recalibration_ddp_run.py")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3])
def test_all_ranks_end_with_the_statistics_of_all_samples(ranks, tmp_path):
    for done in on_ranks(ranks, tmp_path, SCRIPT, ranks):
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
