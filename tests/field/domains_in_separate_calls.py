"""Source and target go through a network in separate calls: adapt-python/adapt#92.

Each call is normalised by its own statistics, and the running ones are those of a mixture that no
call has. scikit-adaptation/skada#252 and filaPro/visda2019#1 join the two domains in one batch.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, train
from tests.networks import conv_net, digits


def _train(*, joins: bool) -> Run:
    images, labels = digits()
    target = 1.5 - 1.5 * images
    model = conv_net()

    def loss(batch: torch.Tensor) -> torch.Tensor:
        other = torch.randint(1200, batch.shape)
        if joins:
            scores, wild = model(torch.cat([images[batch], target[other]])).split(len(batch))
        else:
            scores, wild = model(images[batch]), model(target[other])
        certainty = wild.softmax(1).square().sum(1).mean()
        return F.cross_entropy(scores, labels[batch]) - 0.1 * certainty

    return train(model, loss=loss)


SITUATION = Situation(
    healthy=partial(_train, joins=True),
    faulty=partial(_train, joins=False),
    cause="BN207",
)
