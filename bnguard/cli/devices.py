"""Devices, as a command line names them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import cast

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, IterableDataset, Subset

from bnguard.cli.sharing import loader_over
from bnguard.errors import ConfigurationError

# What Lightning calls a GPU, whosever it is.
_ANY_GPU = "gpu"


def usable_device(name: str) -> torch.device:
    """Return the device that is named as torch names it, or as Lightning does.

    Raises:
        ConfigurationError: There is none of this name here.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(_first_gpu() if name == _ANY_GPU else name)
        torch.empty(0, device=device)
    # A torch built without CUDA asserts, and a backend without a kernel implements nothing.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigurationError(
            f"--device {name} cannot be used here ({reason}): use cpu"
        ) from error
    if device.type == "meta":
        raise ConfigurationError("--device meta computes nothing: use cpu")
    return device


def lightning_device(device: torch.device) -> tuple[str, list[int] | int]:
    """Return ``accelerator`` and ``devices``, as Lightning's classes take them.

    >>> lightning_device(torch.device("cuda:1")), lightning_device(torch.device("cpu"))
    (('gpu', [1]), ('cpu', 1))
    """
    if device.type == "cuda":
        return "gpu", [device.index or 0]
    return device.type, 1


def _first_gpu() -> str:
    return "mps" if torch.backends.mps.is_available() else "cuda"


# Commands under a launcher such as torchrun: a share of the data each, and one that writes.


@contextmanager
def launched_ranks() -> Iterator[None]:
    """Join the processes that a launcher started, for as long as this lasts; or run alone."""
    if not (dist.is_available() and dist.is_torchelastic_launched()) or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")  # What is exchanged is small, and in the memory of the host.
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_first_rank() -> bool:
    """Return whether this process prints and writes."""
    return _rank_and_size()[0] == 0


def share_of_rank(loader: Iterable[object]) -> Iterable[object]:
    """Return this rank's share of a loader: samples drawn at random where they can be, or batches.

    The random order is the same on all ranks, so no sample is in two shares.
    """
    rank, size = _rank_and_size()
    if size == 1:
        return loader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return islice(loader, rank, None, size)
    total = len(cast("Sized", loader.dataset))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return loader_over(loader, Subset(loader.dataset, order[rank::size].tolist()))


def _rank_and_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
