"""Real checkpoints of a Lightning Trainer: read, repaired, and training resumed from them."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnguard.checkpoint import compare, load_state_dict, read_checkpoint, write_statistics
from tests.checkpoint.saving import new_statistics


class Config:
    """A class that a checkpoint mentions and nobody imports to read it."""

    def __init__(self, depth):
        self.depth = depth


class Classifier(pl.LightningModule):
    def __init__(self, width=4, betas=(0.9, 0.99), config=None):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.seen = []

    def training_step(self, batch, _):
        self.seen.append(int(self.net[1].num_batches_tracked))
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), 1e-2, self.hparams.betas)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def loader():
    return DataLoader(TensorDataset(torch.randn(32, 8), torch.arange(32) % 2), batch_size=8)


def trainer(folder, epochs):
    return pl.Trainer(
        max_epochs=epochs,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.fixture
def trained(tmp_path, recwarn):
    """A checkpoint of two epochs of four steps."""
    run = trainer(tmp_path, 2)
    run.fit(Classifier(config=Config(3)), loader())
    path = tmp_path / "trained.ckpt"
    run.save_checkpoint(path)
    return path


def test_it_is_read_as_lightning_reads_it(trained):
    checkpoint = read_checkpoint(trained)
    (layer,) = checkpoint.layers
    assert (layer.name, layer.prefix, layer.counter) == ("net.1", "state_dict.net.1.", 8)
    assert checkpoint.hyper_parameters.values == {"width": 4, "betas": (0.9, 0.99)}
    assert checkpoint.hyper_parameters.objects.keys() == {"config"}
    theirs = torch.load(trained, weights_only=False)
    assert (checkpoint.epoch, checkpoint.global_step) == (theirs["epoch"], theirs["global_step"])
    assert load_state_dict(trained).keys() == theirs["state_dict"].keys()


def test_training_resumes_from_the_copy(trained, tmp_path, recwarn):
    statistics = new_statistics(trained)
    copy = write_statistics(trained, tmp_path / "copy.ckpt", statistics, {"action": "test"})
    assert compare(read_checkpoint(trained), read_checkpoint(copy)).entries == ()
    model = Classifier()
    started = {}

    class Start(pl.Callback):
        def on_train_start(self, run, module):
            started.update({k: v.clone() for k, v in module.net[1].named_buffers()})
            started["step"] = run.global_step
            started["moment"] = run.optimizers[0].state[module.net[0].weight]["exp_avg"].clone()

    run = trainer(tmp_path, 3)
    run.callbacks.append(Start())
    run.fit(model, loader(), ckpt_path=copy, weights_only=False)
    assert torch.equal(started["running_mean"], statistics["state_dict.net.1.running_mean"])
    assert torch.equal(started["running_var"], statistics["state_dict.net.1.running_var"])
    old = torch.load(trained, weights_only=False)
    assert started["step"] == old["global_step"]
    assert torch.equal(started["moment"], old["optimizer_states"][0]["state"][0]["exp_avg"])
    assert model.seen == [8, 9, 10, 11]
    assert run.global_step == 12


def test_load_from_checkpoint_takes_the_copy(trained, tmp_path):
    copy = write_statistics(trained, tmp_path / "copy.ckpt", new_statistics(trained), {})
    model = Classifier.load_from_checkpoint(copy, weights_only=False)
    assert model.net[1].running_mean.tolist() == [10.0, 11.0, 12.0, 13.0]
    assert model.hparams.config.depth == 3
