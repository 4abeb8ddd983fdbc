"""One data set a batch, the next in the next: SimonVandenhende/Multi-Task-Learning-PyTorch#28.

Each batch has the statistics of its own data set, and evaluation the average of all.
lorenmt/mtan#28 sees the metrics change with the size of the batches of the test.
"""

from __future__ import annotations

from functools import partial

import torch

from tests.field.situation import Run, Situation, train
from tests.networks import conv_net, digits


def _train(*, mixes: bool) -> Run:
    images, _ = digits()
    images = torch.where(torch.arange(1797).view(-1, 1, 1, 1) % 2 == 0, images, 3.0 - 2.0 * images)

    def batches() -> list[torch.Tensor]:
        order = torch.randperm(1200)
        if mixes:
            return list(order.split(64))
        both = zip(order[order % 2 == 0].split(64), order[order % 2 == 1].split(64), strict=True)
        return [batch for pair in both for batch in pair]

    return train(conv_net(), images=images, batches=batches, epochs=5)


SITUATION = Situation(
    healthy=partial(_train, mixes=True),
    faulty=partial(_train, mixes=False),
    cause="BN203",
)
