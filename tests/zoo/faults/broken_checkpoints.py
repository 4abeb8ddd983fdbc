"""Checkpoints with a variance or a gain that no training makes; healthy: as trained."""

from __future__ import annotations

import torch

import bnguard
from tests.zoo.fault import Fault
from tests.zoo.training import Watched, norms, pretrained


def negative(layer):
    layer.running_var[3] = -0.2


def infinite(layer):
    layer.running_var[2] = torch.inf


def enlarged(layer):
    # A state dict does not hold eps: a gain of 15,811 with 1e-5, and of 1,581 with 1e-3.
    layer.running_var[1] = 1e-12
    layer.weight[1] = 50.0


def inspected(spoil):
    def run(is_faulty, architecture):
        model = pretrained(architecture)
        if is_faulty:
            with torch.no_grad():
                spoil(norms(model)[0])
        return Watched(bnguard.inspect(model.state_dict()), 0)

    return run


NEGATIVE = Fault("BN403", "a negative variance in a checkpoint", inspected(negative), ("mlp",))
ENLARGED = Fault("BN403", "a variance near zero in a checkpoint", inspected(enlarged), ("mlp",))
INFINITE = Fault("BN402", "an infinite variance in a checkpoint", inspected(infinite), ("conv",))
