"""One draw of the augmentation for all images of a batch; healthy: one for each image."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    def brighter(images):
        draws = 1 if is_faulty else len(images)
        return images + torch.empty(draws, 1, 1, 1).uniform_(-0.5, 0.5)

    return train(build(architecture), prepare=brighter)


FAULT = Fault("BN203", "one augmentation a batch", run, ("conv", "mlp"))
