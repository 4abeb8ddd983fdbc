"""The same under Lightning: digits, a real Trainer, and BatchNormMonitor among its callbacks."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import pytorch_lightning as lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

from bnguard.findings import Severity
from bnguard.lightning import BatchNormMonitor
from tests.networks import digits
from tests.zoo.architectures import build
from tests.zoo.training import Told, Watched, loss_of, pretrained


class Classifier(lightning.LightningModule):
    """A network of the zoo as backbone and head, which fine-tuning tells apart."""

    def __init__(self, architecture="conv", **options):
        super().__init__()
        layers = build(architecture, **options)
        self.backbone, self.head = layers[:-1], layers[-1]

    def forward(self, images):
        return self.head(self.backbone(images))

    def training_step(self, batch, batch_idx):
        return loss_of(self(batch[0]), *batch)

    def validation_step(self, batch, batch_idx):
        self.log("loss", loss_of(self(batch[0]), *batch))

    def configure_optimizers(self):
        return torch.optim.SGD(
            [parameter for parameter in self.parameters() if parameter.requires_grad],
            lr=0.05,
            momentum=0.9,
        )


def trained(module, architecture):
    """Return the module with the weights and statistics of a network that was trained."""
    layers = pretrained(architecture)
    module.backbone.load_state_dict(layers[:-1].state_dict())
    module.head.load_state_dict(layers[-1].state_dict())
    return module


def training_data(samples=1200, change=lambda images: images):
    images, labels = digits()
    return TensorDataset(change(images[:samples]), labels[:samples])


def fit(
    module,
    *callbacks,
    samples=1200,
    batch_size=32,
    change=lambda images: images,
    change_evaluation=lambda images: images,
    loader=None,
    **options,
):
    """Train a module on digits, and return what the callback says."""
    images, labels = digits()
    monitor = BatchNormMonitor(every_n_steps=10, max_overhead=0.0, report="none", strict=True)
    trainer = lightning.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 4,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            **options,
        },
        callbacks=[*callbacks, monitor],
    )
    # The callback prints what it finds; it is returned here.
    with redirect_stdout(io.StringIO()):
        trainer.fit(
            module,
            loader
            or DataLoader(
                training_data(samples, change), batch_size=batch_size, shuffle=True, drop_last=True
            ),
            DataLoader(TensorDataset(change_evaluation(images[1200:]), labels[1200:]), 128),
        )
    return watched(monitor)


def watched(monitor):
    """Return what a callback found; a checkpoint holds what it found during training."""
    checkpoint = {}
    monitor.on_save_checkpoint(None, None, checkpoint)
    told = tuple(
        Told(record["code"], Severity[record["severity"].upper()], record["first_step"])
        for record in checkpoint["bnguard"]["monitor"]["findings"]
    )
    return Watched(monitor.report, monitor.report.history.run.steps, told)
