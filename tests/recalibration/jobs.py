"""A calibration job to test its parts with."""

from __future__ import annotations

import torch
from torch import nn

from bnguard.distributed import Ranks
from bnguard.layers.bn_layer import find_layers
from bnguard.recalibration.statistics import Job, NoProgress, estimate_unbiased


def job_of(model: nn.Module) -> Job:
    """Return a job that calibrates all layers of a model, without data."""
    return Job(
        model=model.eval(),
        device=torch.device("cpu"),
        noise=1e-4,
        layers=find_layers(model),
        batches=iter(()),
        samples=100,
        forward=None,
        estimate=estimate_unbiased,
        on_nonfinite="skip",
        memory=2**30,
        tolerance=None,
        ranks=Ranks(),
        progress=NoProgress(),
    )
