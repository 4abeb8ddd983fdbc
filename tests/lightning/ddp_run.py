"""Trains on two processes: ``python ddp_run.py FOLDER CASE``; the results are in FOLDER."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bnguard.lightning import BatchNormMonitor, BatchNormRecalibration

MEANS = (0.0, 3.0)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, inputs):
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        # Another distribution on each rank, as with data sharded by class.
        return F.cross_entropy(self(batch[0] + MEANS[self.global_rank]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Looks(Callback):
    """Computes the batch means naively, and keeps what the monitor says of the newest window."""

    def __init__(self, monitor):
        self.monitor, self.true, self.read = monitor, [], None

    def on_train_start(self, trainer, pl_module):
        def note(module, args, output):
            if module.training:
                self.true.append(args[0].detach().double().mean(0))

        pl_module.net[1].register_forward_hook(note)

    def on_train_end(self, trainer, pl_module):
        if self.monitor._monitor is not None:
            self.read = self.monitor._monitor.snapshot().layers[0].window.mean


class Poisons(Callback):
    """A NaN in the statistics of rank one alone, which the next broadcast hides."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 5:
            pl_module.net[1].running_mean[2] = torch.nan


class Raises(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 5:
            raise RuntimeError("out of cheese")


class BreaksOurs(Callback):
    """Lets bnguard fail on rank one: the other must not wait for it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1 and batch_idx == 3:
            monitors = [c for c in trainer.callbacks if isinstance(c, BatchNormMonitor)]
            monitors[0]._monitor._observer = None


def main(folder: Path, case: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = TensorDataset(torch.randn(192, 4), torch.randint(0, 2, (192,)))
    monitor = BatchNormMonitor(
        every_n_steps=4, strict=case != "ours", stop_on="error" if case == "poison" else None
    )
    extra = {
        "poison": [Poisons()],
        "raises": [Raises()],
        "ours": [BreaksOurs()],
        "recalibration": [BatchNormRecalibration(keep="always", strict=True)],
    }.get(case, [])
    looks = Looks(monitor)
    trainer = Trainer(
        accelerator="cpu",
        strategy=DDPStrategy(broadcast_buffers=case != "apart"),
        devices=2,
        max_epochs=2,
        callbacks=[*extra, looks, monitor],
        logger=CSVLogger(folder, version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=4,
    )
    model = Net()
    trainer.fit(model, DataLoader(data, 8), DataLoader(data, 8))
    report = monitor.report
    result = {
        "steps": trainer.global_step,
        "is_off": monitor.is_off,
        "state": model.state_dict(),
        "findings": [] if report is None else [f.to_dict() for f in report.findings],
        "read": looks.read,
        "true": torch.stack(looks.true[-4:]).mean(0),
        "plan": None if report is None else report.history.run.plan.ranks,
    }
    (folder / f"rank{trainer.global_rank}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
