"""A BN class with an activation of its own, converted; healthy: not converted."""

from __future__ import annotations

import torch
from torch import nn

import bnguard
from tests.zoo.fault import Fault
from tests.zoo.training import Watched


class NormWithActivation(nn.BatchNorm2d):
    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


def run(is_faulty, architecture):
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, bias=False), NormWithActivation(8), nn.Conv2d(8, 8, 3, bias=False)
    )
    for _ in range(40):
        model(torch.rand(16, 1, 8, 8))
    if is_faulty:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return Watched(bnguard.inspect(model), 0)


FAULT = Fault("BN108", "an activation lost in a conversion", run)
