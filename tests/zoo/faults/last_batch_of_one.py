"""A last batch of one sample; healthy: drop_last."""

from __future__ import annotations

from torch.utils.data import DataLoader

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    # Ended before the batch that would raise: it has to be told ahead.
    loader = DataLoader(range(1153), batch_size=32, drop_last=not is_faulty)
    return train(build(architecture), loader=loader, samples=1153, max_steps=32)


FAULT = Fault("BN102", "a last batch of one", run, ("mlp",))
