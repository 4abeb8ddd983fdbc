"""Adversarial images are computed in train mode: locuslab/fast_adversarial#14.

Each step calls the network twice, on images that differ little, and updates the running statistics
with both; the authors see no harm.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, train
from tests.networks import conv_net, digits


def _healthy() -> Run:
    images, labels = digits()
    model = conv_net()

    def loss(batch: torch.Tensor) -> torch.Tensor:
        noise = (0.05 * torch.empty_like(images[batch]).uniform_(-1, 1)).requires_grad_()
        F.cross_entropy(model(images[batch] + noise), labels[batch]).backward()
        model.zero_grad()
        attacked = images[batch] + (noise + 0.06 * noise.grad.sign()).clamp(-0.05, 0.05).detach()
        return F.cross_entropy(model(attacked), labels[batch])

    return train(model, loss=loss, epochs=3)


SITUATION = Situation(healthy=_healthy)
