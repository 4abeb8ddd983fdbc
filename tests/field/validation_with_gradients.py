"""Normalised in training and not in the test: JeasunLok/ResNet-pytorch#1.

The validation puts the network in eval mode and leaves out ``torch.no_grad``, as many do, for which
LIVIAETS/SizeLoss_WSS#1 pays with memory. Steps and evaluations are noticed.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch, shuffled
from tests.networks import conv_net, digits


def _train(*, prepares_both: bool) -> Run:
    model, (images, labels) = conv_net(), digits()
    prepared = (images - images.mean()) / images.std()
    held = (prepared if prepares_both else images)[1200:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(4):
        model.train()
        for batch in shuffled(64)():
            optimizer.zero_grad()
            F.cross_entropy(model(prepared[batch]), labels[batch]).backward()
            optimizer.step()
        model.eval()
        scores = torch.cat([model(part) for part in held.split(128)])
    return watch.end((scores.argmax(1) == labels[1200:]).float().mean().item())


SITUATION = Situation(
    healthy=partial(_train, prepares_both=True),
    faulty=partial(_train, prepares_both=False),
    cause="BN305",
)
