"""Noise before BN in training alone, as in a VAE that is evaluated at its means."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.fault import Fault
from tests.zoo.training import train


class Noisy(nn.Module):
    def __init__(self, is_everywhere):
        super().__init__()
        self.is_everywhere = is_everywhere

    def forward(self, x):
        is_noisy = self.training or self.is_everywhere
        return x + torch.randn_like(x) if is_noisy else x


def run(is_faulty, architecture):
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 16),
        Noisy(not is_faulty),
        nn.Linear(16, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 64),
        nn.Unflatten(1, (1, 8, 8)),
    )
    return train(model, loss=lambda out, images, _: (out - images).square().mean())


FAULT = Fault("BN301", "noise in training alone", run, ("mlp",), False)
