"""Weights so fast that the running statistics lag behind: eval mode loses 10 to 20 points."""

from __future__ import annotations

import torch

from tests.zoo.fault import Fault
from tests.zoo.healthy.other_networks import Dense
from tests.zoo.training import sgd, train


def run(is_faulty, architecture):
    model = Dense()
    slow = torch.optim.Adam(model.parameters(), 2e-3)
    return train(model, epochs=3, optimizer=sgd(model) if is_faulty else slow)


FAULT = Fault("BN302", "weights too fast for the statistics", run, ("dense",), shows_early=False)
