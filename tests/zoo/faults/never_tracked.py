"""Layers built without running statistics; healthy: with them."""

from __future__ import annotations

from torch import nn

from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False),
        nn.BatchNorm2d(8, track_running_stats=not is_faulty),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )
    return train(model, epochs=2)


FAULT = Fault("BN104", "built without statistics", run)
