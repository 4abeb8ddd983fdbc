"""A discriminator called three times a step: soumith/ganhacks#52 has real and generated in turn.

No gradient is accumulated, and the discriminator is never used in eval mode.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch
from tests.networks import digits


def play(batch: int, steps: int) -> Run:
    """Train a GAN on digits, of which the discriminator is watched."""
    images = digits()[0].flatten(1)
    generator = nn.Sequential(
        nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 64), nn.Sigmoid()
    )
    critic = nn.Sequential(
        nn.Linear(64, 32),
        nn.LeakyReLU(0.2),
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.LeakyReLU(0.2),
        nn.Linear(32, 1),
    )
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.999))
        for net in (critic, generator)
    ]
    loss = F.binary_cross_entropy_with_logits
    watch = Watch(critic, {"optimizer": optimizers[0]})
    for _ in range(steps):
        real, fake = images[torch.randint(1200, (batch,))], generator(torch.randn(batch, 8))
        optimizers[0].zero_grad()
        loss(critic(real), torch.ones(batch, 1)).backward()
        loss(critic(fake.detach()), torch.zeros(batch, 1)).backward()
        optimizers[0].step()
        optimizers[1].zero_grad()
        loss(critic(fake), torch.ones(batch, 1)).backward()
        optimizers[1].step()
        watch.monitor.step()
    run = watch.end(1.0)
    # Batches of 4 are small in a GAN as anywhere.
    small = ("BN202",) if batch < 8 else ()
    return Run(
        run.accuracy,
        tuple(finding for finding in run.findings if finding.code not in small),
        tuple(code for code in run.announced if code not in small),
    )


def _healthy() -> Run:
    return play(batch=6, steps=200)


SITUATION = Situation(healthy=_healthy)
