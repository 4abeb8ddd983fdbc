"""Learn to watch a GAN: two models, two optimizers, a monitor each.

The critic sees real and generated samples in one batch, so both are normalised alike. In separate
batches it could tell them apart by their statistics, and bnguard would report BN207.

python examples/gan.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard


def real(count: int) -> Tensor:
    angle = torch.rand(count) * 2 * torch.pi
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(count, 2)


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 32, bias=False), nn.BatchNorm1d(32), nn.LeakyReLU(0.2),
        nn.Linear(32, 32, bias=False), nn.BatchNorm1d(32), nn.LeakyReLU(0.2),
        nn.Linear(32, outputs),
    )  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    generator, critic = network(8, 2), network(2, 1)
    generator_step = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    critic_step = torch.optim.Adam(critic.parameters(), lr=2e-4, betas=(0.5, 0.999))
    labels = torch.cat([torch.ones(64, 1), torch.zeros(64, 1)])

    with (
        bnguard.watch(generator, optimizer=generator_step) as generator_monitor,
        bnguard.watch(critic, optimizer=critic_step) as critic_monitor,
    ):
        for _ in range(100):
            samples = generator(torch.randn(64, 8))
            critic_step.zero_grad()
            scores = critic(torch.cat([real(64), samples.detach()]))
            F.binary_cross_entropy_with_logits(scores, labels).backward()
            critic_step.step()

            generator_step.zero_grad()
            scores = critic(torch.cat([real(64), samples]))[64:]
            F.binary_cross_entropy_with_logits(scores, labels[:64]).backward()
            generator_step.step()

    for name, monitor in {"generator": generator_monitor, "critic": critic_monitor}.items():
        print(name)
        print(monitor.report())


if __name__ == "__main__":
    main()
