"""ReLUs before BN that never fire."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    first = nn.Conv2d(1, 8, 3)
    with torch.no_grad():
        first.bias.fill_(-20.0 if is_faulty else 0.0)
    model = nn.Sequential(first, nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 10))
    return train(model, epochs=2)


FAULT = Fault("BN204", "dead ReLUs before BN", run)
