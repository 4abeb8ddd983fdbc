"""Evaluation at an average of the weights: facebookresearch/schedule_free#60.

The optimizer exchanges the weights for the evaluation, whose statistics are those of other weights.
Its README has the network run on 50 batches of training first, in train mode without gradients.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch, accuracy
from tests.networks import conv_net, digits


def train(*, warms_up: bool, reports: bool = True) -> Run:
    """Train; the loop reports its steps and evaluations, or leaves them to be noticed."""
    images, labels = digits()
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    watch = Watch(model, {"optimizer": optimizer})
    averages = [parameter.detach().clone() for parameter in model.parameters()]

    @torch.no_grad()
    def exchange() -> None:
        for parameter, average in zip(model.parameters(), averages, strict=True):
            parameter.data, average.data = average.data, parameter.data

    for _ in range(4):
        model.train()
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            if reports:
                watch.monitor.step()
            with torch.no_grad():
                for parameter, average in zip(model.parameters(), averages, strict=True):
                    average.lerp_(parameter, 0.008)
        exchange()
        if warms_up:
            with torch.no_grad():
                for batch in torch.randint(1200, (50, 64)):
                    model(images[batch])
        model.eval()
        with watch.monitor.evaluation() if reports else nullcontext():
            last = accuracy(model, images[1200:], labels[1200:])
        exchange()
    return watch.end(last)


SITUATION = Situation(
    healthy=partial(train, warms_up=True),
    faulty=partial(train, warms_up=False),
    cause="BN304",
)
