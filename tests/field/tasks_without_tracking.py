"""Layers that keep no running statistics, tested on small tasks: tristandeleu/pytorch-maml#7.

A larger batch at inference gives better results, since the batch is all that normalises.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tests.field.situation import Run, Situation, Watch, shuffled
from tests.networks import conv_net, digits


def _train(*, tracks: bool) -> Run:
    images, labels = digits()
    model = conv_net()
    for i, channels in ((1, 8), (4, 16), (7, 32)):
        model[i] = nn.BatchNorm2d(channels, track_running_stats=tracks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    order = labels[1200:].argsort() + 1200
    for _ in range(4):
        model.train()
        for batch in shuffled(64)():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        model.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            scores = torch.cat([model(images[part]) for part in order.split(4)])
    return watch.end((scores.argmax(1) == labels[order]).float().mean().item())


SITUATION = Situation(
    healthy=partial(_train, tracks=True),
    faulty=partial(_train, tracks=False),
    cause="BN104",
)
