"""Unlabelled data with classes that no test has: xu-ji/IIC#10.

Most of a training batch are distractors, unlike the images of the test, and the running statistics
are theirs; the authors evaluate with batch statistics as well, and report both.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, train
from tests.networks import conv_net, digits


def _train(*, has_distractors: bool) -> Run:
    images, labels = digits()
    model = conv_net()

    def loss(batch: torch.Tensor) -> torch.Tensor:
        part = images[batch[:32]]
        others = 2.0 + torch.randn(96 if has_distractors else 0, 1, 8, 8).cumsum(3)
        scores = model(torch.cat([part, others]))[: len(part)]
        return F.cross_entropy(scores, labels[batch[:32]])

    return train(model, loss=loss)


SITUATION = Situation(
    healthy=partial(_train, has_distractors=False),
    faulty=partial(_train, has_distractors=True),
    cause="BN305",
)
