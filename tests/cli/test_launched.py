"""``recalibrate`` on several ranks: a share of the samples each, one file."""

import json

import pytest
import torch

import bnguard
from bnguard.demo import DigitsData, DigitsNet
from tests.cli import running

COMMAND = ("recalibrate", "last.ckpt", *running.DEMO, "--split=train", "--samples=5000", "--json")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2])
def test_processes_share_the_samples_and_one_of_them_writes(ranks, tmp_path):
    torch.manual_seed(0)
    model, data = DigitsNet(), DigitsData()
    torch.save(
        {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.5.0"},
        tmp_path / "last.ckpt",
    )
    first, *others = running.on_ranks(ranks, tmp_path, *COMMAND, command=running.bnguard)
    for done in (first, *others):
        assert done.returncode == 0, done.stderr
    assert not any(done.stdout for done in others)
    document = json.loads(first.stdout)
    data.setup("fit")
    alone = bnguard.recalibrate(model.eval(), data.train_dataloader(), samples=5000)
    assert document["samples"] == alone.samples
    together = torch.load(tmp_path / "last-recalibrated.ckpt")["state_dict"]
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.allclose(together[key], value, rtol=1e-5, atol=1e-5), key
