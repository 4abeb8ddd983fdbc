"""Each batch from one group (a scanner) with a brightness of its own."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    brightness = 0.5 * torch.randn(8)

    def prepare(images):
        scanner = torch.randint(8, (1 if is_faulty else len(images),))
        return images + brightness[scanner].view(-1, 1, 1, 1)

    return train(build(architecture), prepare=prepare)


FAULT = Fault("BN203", "batches of one group each", run, ("conv", "volumes"))
