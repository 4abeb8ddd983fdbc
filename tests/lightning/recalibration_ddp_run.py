"""Recalibrates in a Trainer with ddp: ``python recalibration_ddp_run.py FOLDER RANKS``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from bnguard.lightning import BatchNormRecalibration


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2), nn.BatchNorm1d(2)
        )

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def on_fit_end(self) -> None:
        """Call ``recalibrate`` as a user would, each rank on its share of the samples."""
        rank, size = self.global_rank, self.trainer.world_size
        bnguard.recalibrate(self, data().tensors[0][rank::size].split(7), samples=1000)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(190, 4, generator=generator) * 2.0 + 1.0
    return TensorDataset(inputs, (inputs[:, 0] > 1.0).long())


def main(folder: Path, ranks: int) -> None:
    torch.set_num_threads(1)
    callback = BatchNormRecalibration(when="fit-end", samples=1000, keep="always", strict=True)
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=ranks,
        max_epochs=1,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Net()
    trainer.fit(module, DataLoader(data(), 8), DataLoader(data(), 8))
    by_callback = {name: (s.mean, s.var) for name, s in callback.result.after.items()}
    torch.save((module.state_dict(), by_callback), folder / f"{trainer.global_rank}.pt")
    if torch.distributed.is_initialized():
        # Else the threads of gloo may outlive what they use, and abort the process.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
