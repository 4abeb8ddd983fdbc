"""Samples of the trainer's own loaders, drawn without touching the loaders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, Subset

from bnguard.distributed import number_of_ranks
from bnguard.errors import ConfigurationError
from bnguard.lightning.framework import CombinedLoader, LightningModule, Trainer
from bnguard.lightning.trainer import Split, datamodule_of, most_batches, validation_mode

_BATCH_SIZE = 32


def split_samples(
    trainer: Trainer, split: Split, samples: int, *, instead: str
) -> Iterable[object]:
    """Return batches of samples of a split, drawn as :func:`drawn_samples` does.

    Of several validation loaders the first one gives them, unless the trainer puts a batch of each
    together: then this does.

    Args:
        trainer: The trainer, whose limits on batches hold.
        split: Which one.
        samples: Samples to draw at most, on all ranks together.
        instead: What to do where there is no loader.

    Raises:
        ConfigurationError: There is none, or several of training.
    """
    loaders: Any = trainer.train_dataloader if split == "train" else trainer.val_dataloaders
    source = datamodule_of(trainer)
    mode: Any = "sequential" if split == "train" else validation_mode(trainer)
    if loaders is None and source is not None:
        loaders = source.train_dataloader() if split == "train" else source.val_dataloader()
    if hasattr(loaders, "iterables"):  # A CombinedLoader, of either package.
        loaders, mode = loaders.iterables, getattr(loaders, "_mode", mode)
    several = [] if loaders is None else tree_leaves(loaders)
    if not several or (split == "train" and several[0] is not loaders):
        found = "several" if several else "no"
        raise ConfigurationError(f"the trainer has {found} {split} loaders: {instead}")

    def drawn(loader: Iterable[object]) -> Iterable[object]:
        return drawn_samples(
            loader, samples, trainer.global_rank, most_batches(trainer, split, loader)
        )

    if mode == "sequential":
        return drawn(several[0])
    return (batch for batch, *_ in CombinedLoader(tree_map(drawn, loaders), mode))


def drawn_samples(
    loader: Iterable[object], samples: int, rank: int, most_batches: float = math.inf
) -> Iterable[object]:
    """Return batches of samples that are drawn at random, always the same, and a share a rank.

    A ``DataLoader`` over a data set with indices is not iterated itself: that would draw from its
    random state, and with persistent workers end the epoch that is under way. Anything else is.

    Args:
        loader: The loader.
        samples: Samples to draw at most, on all ranks together.
        rank: Number of this process.
        most_batches: Batches to return at most. Where they come in the order of the data set, the
            samples are those of as many batches.
    """
    batch_size = getattr(loader, "batch_size", None)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return _FirstBatches(loader, int(min(most_batches, math.ceil(samples / (batch_size or 1)))))
    size, ranks = batch_size or _BATCH_SIZE, number_of_ranks()
    population = getattr(loader.sampler, "indices", range(len(loader.dataset)))  # type: ignore[arg-type]
    most = min(most_batches * size * ranks, len(population))
    if isinstance(loader.sampler, SequentialSampler):
        population = population[: int(most)]
    order = torch.randperm(len(population), generator=torch.Generator().manual_seed(0))
    share = [int(population[i]) for i in order[: int(min(samples, most))].tolist()][rank::ranks]
    return DataLoader(
        Subset(loader.dataset, share),
        batch_size=size,
        collate_fn=loader.collate_fn,
        # A validation step may rely on full batches.
        drop_last=loader.drop_last and len(share) >= size,
        generator=torch.Generator(),
    )


@dataclass(frozen=True)
class _FirstBatches:
    """The first batches of a loader, each time it is iterated."""

    loader: Iterable[object]
    number: int

    def __iter__(self) -> Iterator[object]:
        return islice(self.loader, self.number)


def transferred(
    batches: Iterable[object], trainer: Trainer, module: LightningModule
) -> Iterator[Any]:
    """Yield batches as the module's steps are given them: in its precision, on its device.

    The transfer hooks of the module run, which may augment or normalise.
    """
    for batch in batches:
        converted = trainer.precision_plugin.convert_input(batch)
        before = module.on_before_batch_transfer(converted, 0)
        yield trainer.strategy.batch_to_device(before, dataloader_idx=0)


def plain_forward(module: nn.Module, batch: object) -> object:
    """Call a module on a batch as most loaders mean it: a tensor, or what comes before targets."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(batch[0] if isinstance(batch, (tuple, list)) else batch)
