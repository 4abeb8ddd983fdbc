"""Which samples of a loader calibrate, and which score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from typing import cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from bnguard.errors import ConfigurationError


@dataclass(frozen=True)
class Samples:
    """Which samples calibrate, and which score.

    Attributes:
        calibration: Loader of the samples that the statistics come from.
        scoring: Loader of the samples that the model is scored on; None where there are none.
        is_shared: Whether the same samples do both.
    """

    calibration: Iterable[object]
    scoring: Iterable[object] | None
    is_shared: bool


def shared_out(loader: Iterable[object], samples: int, holdout: float | None) -> Samples:
    """Return the samples of one split, shared out between calibration and scoring.

    Args:
        loader: Loader of the split.
        samples: Samples to calibrate on at most.
        holdout: Share of the split that scores and does not calibrate; None leaves to scoring
            what ``samples`` leaves over, or all of it where nothing is left over.

    Raises:
        ConfigurationError: A share is asked for of a loader that has no data set to share out.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        if holdout is not None:
            raise ConfigurationError(
                "--holdout needs a DataLoader over a data set with a length; leave it out"
            )
        return Samples(loader, loader, is_shared=True)
    total = len(cast("Sized", loader.dataset))
    calibrating = min(samples, total)
    if holdout is not None:
        calibrating = min(calibrating, total - math.ceil(holdout * total))
    if calibrating == total:
        return Samples(loader, loader, is_shared=True)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
    return Samples(
        loader_over(loader, Subset(loader.dataset, order[:calibrating])),
        loader_over(loader, Subset(loader.dataset, order[calibrating:])),
        is_shared=False,
    )


def loader_over(loader: DataLoader[object], dataset: Dataset[object]) -> DataLoader[object]:
    """Return a loader like the one given over another data set, in order and without dropping."""
    return DataLoader(
        dataset,
        batch_size=loader.batch_size or 1,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )
