"""The momentum of BN falls with the learning rate: torch-points3d/torch-points3d#524.

PointNet and VoteNet begin with 0.5, and halve it every few epochs down to 0.01.
"""

from __future__ import annotations

import itertools

from torch import nn

from tests.field.situation import Run, Situation, shuffled, train
from tests.networks import conv_net


def _healthy() -> Run:
    model, epochs = conv_net(), itertools.count()

    def start() -> None:
        model.train()
        momentum = max(0.5 * 0.5 ** (next(epochs) // 2), 0.01)
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = momentum

    return train(model, batches=shuffled(32), epochs=8, start=start)


SITUATION = Situation(healthy=_healthy)
