"""Batches of two domains in turn; healthy: both domains in each batch."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    batches = [0]

    def prepare(images):
        batches[0] += 1
        inverted = 1.0 - images
        if is_faulty:
            return inverted if batches[0] % 2 else images
        return torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, inverted)

    return train(build(architecture), prepare=prepare)


FAULT = Fault("BN203", "two domains in turn", run, ("conv", "resnet"))
