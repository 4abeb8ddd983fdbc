"""A GAN on digits, of which the generator or the discriminator is watched."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import bnguard
from tests.networks import digits
from tests.zoo.training import Watched, told_of

STEPS = 150


def train_gan(
    watched, *, momentum=0.1, is_concatenated=True, is_generator_without_grad=False
) -> Watched:
    """Train both, and evaluate both.

    The discriminator is fed real and generated digits as one batch, or in two calls.
    """
    generator = nn.Sequential(
        nn.Linear(8, 32, bias=False),
        nn.BatchNorm1d(32, momentum=momentum),
        nn.ReLU(),
        nn.Linear(32, 64),
        nn.Sigmoid(),
    )
    discriminator = nn.Sequential(
        nn.Linear(64, 32, bias=False),
        nn.BatchNorm1d(32, momentum=momentum),
        nn.LeakyReLU(0.2),
        nn.Linear(32, 1),
    )
    images = digits()[0].flatten(1)
    optimizers = [
        torch.optim.Adam(net.parameters(), lr=1e-3, betas=(0.5, 0.999))
        for net in (generator, discriminator)
    ]

    def judged(real, fake):
        if is_concatenated:
            return discriminator(torch.cat([real, fake])).squeeze(1)
        return torch.cat([discriminator(real), discriminator(fake)]).squeeze(1)

    model = generator if watched == "generator" else discriminator
    told = []
    with bnguard.watch(
        model,
        optimizer=optimizers,
        every_n_steps=10,
        max_overhead=0.0,
        planned_steps=STEPS,
        on_findings=told.append,
    ) as monitor:
        for _ in range(STEPS):
            real = images[torch.randint(1200, (32,))]
            with torch.set_grad_enabled(not is_generator_without_grad):
                fake = generator(torch.randn(32, 8))
            optimizers[1].zero_grad()
            truth = torch.cat([torch.ones(32), torch.zeros(32)])
            F.binary_cross_entropy_with_logits(judged(real, fake.detach()), truth).backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            scores = judged(real, generator(torch.randn(32, 8)))[32:]
            F.binary_cross_entropy_with_logits(scores, torch.ones(32)).backward()
            optimizers[0].step()
            monitor.step()
        generator.eval()
        discriminator.eval()
        with torch.no_grad(), monitor.evaluation():
            judged(images[1200:1328], generator(torch.randn(128, 8)))
        return Watched(monitor.report(), STEPS, told_of(told))
