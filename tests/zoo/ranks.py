"""The same on two real processes, which talk through gloo."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path

import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy

from tests.cli.running import FORKS
from tests.ports import free_port
from tests.zoo.training import Watched

RANKS = 2


def on_two_ranks(run, *arguments) -> Watched:
    """Return what rank 0 says of a run; ``run`` is a function of a module, since it is sent."""
    seed = torch.initial_seed()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "watched.pickle"
        processes = [
            FORKS.Process(target=_rank, args=(rank, port, seed, result, run, arguments))
            for rank in range(RANKS)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"{run.__name__} failed on a rank: see its error above")
        return pickle.loads(result.read_bytes())


def ddp(**options) -> DDPStrategy:
    """Return the strategy for processes that were started here."""
    return DDPStrategy(cluster_environment=LightningEnvironment(), **options)


def _rank(rank, port, seed, result, run, arguments) -> None:
    from tests.zoo.runs import quiet

    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(RANKS),
    }
    quiet()
    torch.manual_seed(seed)
    watched = run(*arguments)
    if rank == 0:
        result.write_bytes(pickle.dumps(watched))
    if torch.distributed.is_initialized():
        # Else the one that ends first takes the other's store with it, which says so at length.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
