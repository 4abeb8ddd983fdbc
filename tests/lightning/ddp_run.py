"""Trains on two processes, case after case: ``python -m tests.lightning.ddp_run FOLDER``.

Processes are forked from one that has imported everything, which takes longer than all the cases.
What each printed and found is in FOLDER/CASE.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import DDPStrategy
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

import bnguard
from bnguard import distributed as exchange
from bnguard.lightning import BatchNormMonitor, BatchNormRecalibration
from tests.ports import free_port

MEANS = (0.0, 3.0)


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

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
            self.read = self.monitor._monitor.report(final=False).layers[0].window.mean


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
        if trainer.global_rank == 1 and trainer.global_step == 3:
            monitors = [c for c in trainer.callbacks if isinstance(c, BatchNormMonitor)]
            monitors[0]._monitor._observer = None


def with_lightning(folder: Path, case: str, rank: int) -> dict[str, object]:
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
    watching = [looks, monitor] if case != "rank zero alone" or rank == 0 else []
    trainer = Trainer(
        accelerator="cpu",
        strategy=DDPStrategy(broadcast_buffers=case != "apart"),
        devices=2,
        max_epochs=2,
        callbacks=[*extra, *watching],
        logger=CSVLogger(folder, version=0),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=4,
    )
    model = Net()
    trainer.fit(model, DataLoader(data, 8), DataLoader(data, 8))
    report = monitor.report
    return {
        "steps": trainer.global_step,
        "is_off": monitor.is_off,
        "state": model.state_dict(),
        "findings": [] if report is None else [f.to_dict() for f in report.findings],
        "read": looks.read,
        "true": torch.stack(looks.true[-4:]).mean(0) if looks.true else None,
        "plan": None if report is None else report.history.run.plan.ranks,
    }


def in_a_plain_loop(folder: Path, case: str, rank: int) -> dict[str, object]:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(network(), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    told = []
    monitor = bnguard.watch(model, optimizer=optimizer, on_findings=told.append)
    for _ in range(40):
        model(torch.randn(2, 4) + MEANS[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
    monitor.close()
    alone, of_all = monitor.report(), monitor.report_of_all_ranks()
    return {
        "skipped": [skipped.reason for skipped in alone.skipped if skipped.code == "BN210"],
        "alone": sorted({finding.code for finding in alone.findings}),
        "findings": [finding.to_dict() for finding in of_all.findings],
    }


def with_sharded_parameters(folder: Path, case: str, rank: int) -> dict[str, object]:
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = fully_shard(network(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        monitor = bnguard.watch(model, optimizer=optimizer, every_n_steps=5, strict=True)
    for _ in range(12):
        model(torch.randn(16, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.step()
    model.eval()
    with torch.no_grad(), monitor.evaluation():
        model(torch.randn(16, 4))
    report = monitor.report_of_all_ranks()
    return {
        "warned": [str(warning.message) for warning in warned],
        "updates": report.layers[0].updates_seen,
        "evaluated": report.layers[0].evaluated is not None,
        "codes": {finding.code for finding in report.findings},
    }


CASES = {
    "broadcast": with_lightning,
    "apart": with_lightning,
    "poison": with_lightning,
    "ours": with_lightning,
    "raises": with_lightning,
    "rank zero alone": with_lightning,
    "recalibration": with_lightning,
    "plain loop": in_a_plain_loop,
    "sharded": with_sharded_parameters,
}


def run(folder: Path, case: str, rank: int, port: int) -> None:
    """Be one of the two processes of a case; never returns."""
    os.environ |= {
        "LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }  # fmt: skip
    output = os.open(folder / f"rank{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 1
    try:
        torch.manual_seed(0)
        exchange._FIRST_PATIENCE_S = 1.0
        result = CASES[case](folder, case, rank)
        (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for case in CASES:
        (folder / case).mkdir()
        port = free_port()
        ranks = []
        for rank in range(2):
            child = os.fork()
            if child == 0:
                run(folder / case, case, rank, port)
            ranks.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in ranks]
        (folder / case / "statuses.pickle").write_bytes(pickle.dumps(statuses))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
