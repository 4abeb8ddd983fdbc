"""Samples of the trainer's own loaders, drawn without touching the loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset

from bnguard.errors import ConfigurationError
from bnguard.exchange import number_of_ranks
from bnguard.lightning.framework import LightningModule, Trainer
from bnguard.lightning.trainer import datamodule_of

Split = Literal["train", "validation"]

_BATCH_SIZE = 32


def loader_of(trainer: Trainer, split: Split, *, instead: str) -> Iterable[object]:
    """Return the loader that the trainer has for a split, the first of several for validation.

    Args:
        trainer: The trainer.
        split: Which one.
        instead: What to do where there is none to return.

    Raises:
        ConfigurationError: There is none, or several that belong together.
    """
    loaders = trainer.train_dataloader if split == "train" else trainer.val_dataloaders
    source = datamodule_of(trainer)
    if loaders is None and source is not None:
        loaders = source.train_dataloader() if split == "train" else source.val_dataloader()
    if split == "validation" and isinstance(loaders, (list, tuple)) and loaders:
        loaders = loaders[0]
    if loaders is None or isinstance(loaders, (Mapping, list, tuple)):
        found = "no" if loaders is None else "several"
        raise ConfigurationError(f"the trainer has {found} {split} loaders: {instead}")
    return loaders  # type: ignore[no-any-return]


def sampled(loader: Iterable[object], samples: int, rank: int) -> Iterable[object]:
    """Return batches of samples that are drawn at random, always the same, and a share a rank.

    A ``DataLoader`` over a data set with indices is not iterated itself: that would draw from its
    random state, and with persistent workers end the epoch that is under way. Anything else is.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return loader
    size = len(loader.dataset)  # type: ignore[arg-type]
    drawn = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:samples]
    return DataLoader(
        Subset(loader.dataset, drawn[rank :: number_of_ranks()].tolist()),
        batch_size=loader.batch_size or _BATCH_SIZE,
        collate_fn=loader.collate_fn,
        generator=torch.Generator(),
    )


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
