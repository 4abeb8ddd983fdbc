"""A discriminator that scores images in eval mode after training: pytorch/examples#514.

It was fed real and generated images in turn, each normalised by its own statistics, and one set of
running statistics fits neither.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch
from tests.networks import digits


def _train(*, joins: bool) -> Run:
    images = digits()[0].flatten(1)
    generator = nn.Sequential(
        nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Sigmoid()
    )
    critic = nn.Sequential(
        nn.Linear(64, 32),
        nn.LeakyReLU(0.2),
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.LeakyReLU(0.2),
        nn.Linear(32, 1),
    )
    ours, theirs = (
        torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.999))
        for net in (critic, generator)
    )
    watch = Watch(critic, {"optimizer": ours})

    def scores(*kinds: torch.Tensor) -> list[torch.Tensor]:
        if joins:
            return list(critic(torch.cat(kinds)).chunk(len(kinds)))
        return [critic(kind) for kind in kinds]

    for _ in range(200):
        real, fake = images[torch.randint(1200, (64,))], generator(torch.randn(64, 8))
        ours.zero_grad()
        first, second = scores(real, fake.detach())
        (F.softplus(-first).mean() + F.softplus(second).mean()).backward()
        ours.step()
        theirs.zero_grad()
        F.softplus(-scores(real, fake)[1]).mean().backward()
        theirs.step()
        watch.monitor.step()
    critic.eval()
    with torch.no_grad(), watch.monitor.evaluation():
        real, fake = critic(images[1200:]), critic(generator(torch.randn(597, 8)))
    return watch.end(((real > 0).float().mean() + (fake < 0).float().mean()).item() / 2)


SITUATION = Situation(
    healthy=partial(_train, joins=True),
    faulty=partial(_train, joins=False),
    cause="BN207",
)
