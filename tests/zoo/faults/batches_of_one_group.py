"""Each batch from one group (a scanner) with a brightness of its own; evaluation mixes them."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    brightness = 0.5 * torch.randn(8)

    def scanned(images, draws):
        return images + brightness[torch.randint(8, (draws,))].view(-1, 1, 1, 1)

    return train(
        build(architecture),
        prepare=lambda images: scanned(images, 1 if is_faulty else len(images)),
        prepare_evaluation=lambda images: scanned(images, len(images)),
    )


FAULT = Fault("BN203", "batches of one group each", run, ("conv", "volumes"), shows_early=False)
