"""What the ranks of the distributed tests do; run on each as ``python ranks.py``."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import bnguard
from bnguard.errors import CalibrationError


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = net()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x) + self.encoder(x * 2.0)


class ByShare(nn.Module):
    """Calls its layers in another order where a batch is large."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 6:
            return self.left(x) + self.right(x * 2.0)
        return self.right(x * 2.0) + self.left(x)


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6)
    )


def data() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(120, 4) * 2.0 + torch.linspace(0, 3, 120).view(-1, 1)


def shares(name: str, size: int) -> list[list[Tensor]]:
    """Return the batches of each rank."""
    x = data()
    if name == "uneven":
        cuts = [90, *([30 // (size - 1)] * (size - 1))]
    elif name == "empty rank":
        cuts = [0, *([120 // (size - 1)] * (size - 1))]
    else:
        cuts = [120 // size] * size
    parts = [part.split(7) for part in x.split(cuts)]
    if name == "other order":
        parts[0] = x[: cuts[0]].split(5)
    if name == "not finite":
        parts[1][2][0, 0] = float("nan")
    return [[batch for batch in part if len(batch)] for part in parts]


MODELS = {"several calls": Siamese, "other order": ByShare}
OPTIONS: dict[str, dict[str, object]] = {
    "even": {},
    "uneven": {"samples": 1000},
    "empty rank": {"samples": 1000},
    "several calls": {},
    "other order": {},
    "not finite": {},
    "precise": {"method": "precise"},
    "adapt": {"method": "adapt", "prior": 40},
    "tolerance": {"tolerance": 10.0},
    "wrapped": {},
}


def result_of(name: str, batches: list[Tensor]) -> dict[str, object]:
    """Recalibrate on some batches; return what came of it."""
    model = MODELS.get(name, net)()
    wrapped = model
    if name == "wrapped" and dist.is_initialized():
        wrapped = DistributedDataParallel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = bnguard.recalibrate(wrapped, batches, **OPTIONS[name])
    return {
        "state": model.state_dict(),
        "samples": result.samples,
        "batches": result.batches,
        "left_out": result.left_out,
    }


def failure_of(rank: int, size: int) -> str:
    """Let the loader of rank 1 fail; return what this rank raises."""

    def loader():
        yield from data().split(7)[:3]
        if rank == 1:
            raise OSError("disk on fire")

    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        bnguard.recalibrate(model, loader())
    except CalibrationError as error:
        assert all(torch.equal(before[key], new) for key, new in model.state_dict().items())
        return str(error)
    return "nothing"


def decision_of(rank: int) -> bool:
    """Let the score fall on rank 0 more than it rises on the others."""
    scores = iter([1.0, 0.0] if rank == 0 else [0.0, 0.1])
    return bnguard.recalibrate(net(), data().split(9), score=lambda _: next(scores)).is_kept


def main() -> None:
    """Run every case on one rank, and write down what came of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    results = {name: result_of(name, shares(name, size)[rank]) for name in OPTIONS}
    results["failure"] = failure_of(rank, size)
    results["decision"] = decision_of(rank)
    torch.save(results, f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
