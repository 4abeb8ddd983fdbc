"""Training on one sequence at a time, each with statistics of its own: uci-cbcl/UFold#18.

In train mode every sample is normalised by itself, in eval mode by an average that fits none of
them. limhoyeon/ToothGroupNetwork#23 trains that way too.
"""

from __future__ import annotations

import torch

import bnguard
from tests.field.situation import Run, Situation, shuffled, train
from tests.networks import conv_net, digits


def _train(*, batch_size: int = 1, epochs: int = 2, swaps: bool = False) -> Run:
    images, _ = digits()
    torch.manual_seed(0)
    scale = torch.empty(len(images), 1, 1, 1).uniform_(-2.0, 2.0).exp()
    scaled = scale * images + 3.0 * torch.rand(len(images), 1, 1, 1)
    model = conv_net()
    if swaps:
        model = bnguard.swap(model, to="group").model
    lr = 0.05 * batch_size / 64
    return train(model, images=scaled, batches=shuffled(batch_size), lr=lr, epochs=epochs)


SITUATION = Situation(
    healthy=lambda: _train(batch_size=64, epochs=4),
    faulty=lambda: _train(),
    cause="BN202",
    repaired=lambda: _train(swaps=True).accuracy,
)
