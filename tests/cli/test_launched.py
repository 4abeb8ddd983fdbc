"""``recalibrate`` under torchrun: real processes, a share of the samples each, one file."""

import json
import os
import subprocess
import sys

import pytest
import torch

import bnguard
from bnguard.demo import DigitsData, DigitsNet

COMMAND = ("-m", "bnguard", "recalibrate", "last.ckpt", "--split", "train", "--samples", "5000")
DEMO = ("--model", "bnguard.demo.DigitsNet", "--data", "bnguard.demo.DigitsData")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2])
def test_processes_share_the_samples_and_one_of_them_writes(ranks, tmp_path):
    torch.manual_seed(0)
    model, data = DigitsNet(), DigitsData()
    torch.save(
        {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.5.0"},
        tmp_path / "last.ckpt",
    )
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
    done = subprocess.run(
        [sys.executable, *launcher, *COMMAND, *DEMO, "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # One document: the others print nothing.
    data.setup("fit")
    alone = bnguard.recalibrate(model.eval(), data.train_dataloader(), samples=5000)
    assert document["samples"] == alone.samples
    together = torch.load(tmp_path / "last-recalibrated.ckpt")["state_dict"]
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.allclose(together[key], value, rtol=1e-5, atol=1e-5), key
