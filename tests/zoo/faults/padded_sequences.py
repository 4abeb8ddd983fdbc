"""Sequences padded with zeros to a common length; healthy: of one length."""

from __future__ import annotations

import torch
from torch import nn

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    model = nn.Sequential(
        nn.Conv1d(8, 16, 3, padding=1, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )

    def prepare(images):
        rows = images.squeeze(1).repeat(1, 1, 4) + 0.1 * torch.randn(len(images), 8, 32)
        if is_faulty:
            lengths = torch.randint(6, 33, (len(rows), 1, 1))
            rows = rows * (torch.arange(32) < lengths)
        return rows

    return train(model, prepare=prepare, prepare_evaluation=prepare, epochs=4)


def run_images(is_faulty, architecture):
    """Images of several sizes, padded at two sides to the largest; healthy: of one size."""

    def prepare(images):
        images = images.repeat(1, 1, 2, 2) + 0.1 * torch.randn(len(images), 1, 16, 16)
        if is_faulty:
            heights, widths = torch.randint(6, 17, (2, len(images), 1, 1, 1))
            place = torch.arange(16)
            images = images * ((place.view(16, 1) < heights) & (place < widths))
        return images

    layers = [*build("conv")[:-2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    model = nn.Sequential(*layers)
    return train(model, prepare=prepare, prepare_evaluation=prepare, epochs=3)


IMAGES = Fault("BN211", "images padded to one size", run_images, ("conv",), False)
FAULT = Fault("BN211", "padded sequences", run, ("sequence",), False)
