"""Tiny modules and Trainers of both packages, for runs that take a tenth of a second."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

NOISE = (
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:.*isinstance.treespec:FutureWarning",
    "ignore:Starting from v1.9.0, `tensorboardX`",
    "ignore:You defined a `validation_step`",
    "ignore:.*Checkpoint directory",
    "ignore:Experiment logs directory",
    "ignore:You requested to overfit",
    "ignore:You passed .*AMP with fp16 is not supported on CPU",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:You are trying to `self.log",
    # Dynamo looks at the gradients of what it traces.
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/lightning" in item.path.as_posix():
            for warning in NOISE:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def lightning(request):
    return pytest.importorskip(request.param)


@pytest.fixture(autouse=True)
def _quiet():
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def loader(samples, seed, batch_size=8, **options):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 6, generator=generator) * 2 + 1
    labels = (inputs.sum(1) > 6).long()
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size, **options)


@pytest.fixture
def tiny(lightning):
    """A LightningModule class of the package, with two BN layers and six training batches."""

    class Tiny(lightning.LightningModule):
        def __init__(self, momentum=0.1):
            super().__init__()
            self.batch_size, self.lr = 8, 0.1
            self.backbone = nn.Sequential(
                nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, momentum=momentum), nn.ReLU()
            )
            self.head = nn.Sequential(
                nn.Linear(8, 8, bias=False),
                nn.BatchNorm1d(8, momentum=momentum),
                nn.ReLU(),
                nn.Linear(8, 2),
            )

        def forward(self, inputs):
            return self.head(self.backbone(inputs))

        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def test_step(self, batch, batch_idx):
            self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def predict_step(self, batch, batch_idx):
            return self(batch[0])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

        def train_dataloader(self):
            return loader(6 * self.batch_size, 1, self.batch_size, shuffle=True)

        def val_dataloader(self):
            return loader(24, 2)

        def test_dataloader(self):
            return loader(24, 2)

        def predict_dataloader(self):
            return loader(24, 2)

    return Tiny


@pytest.fixture
def trainer_of(lightning, tmp_path):
    """Returns a Trainer on the CPU that writes nothing but what the options ask for."""

    def trainer(*callbacks, **options):
        return lightning.Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "max_epochs": 2,
                "callbacks": list(callbacks),
                "default_root_dir": tmp_path,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "logger": False,
                "log_every_n_steps": 2,
                **options,
            }
        )

    return trainer
