"""A channel that is dead in training and alive in evaluation."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    model = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )

    def noisy(images):
        return images + 0.1 * torch.randn_like(images)

    def without_margin(images):
        images = noisy(images)
        images[..., 0] = 0.0
        return images

    return train(
        model,
        prepare=without_margin if is_faulty else noisy,
        prepare_evaluation=noisy,
    )


FAULT = Fault("BN403", "a dead channel wakes in evaluation", run, ("mlp",), False)
