"""A NaN in one batch."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    batches = [0]

    def prepare(images):
        batches[0] += 1
        if batches[0] == 9 and is_faulty:
            images = images.clone()
            images[0, 0, 3, 3] = torch.nan
        return images

    return train(build(architecture), prepare=prepare, epochs=2)


FAULT = Fault("BN401", "a NaN in the data", run, ("conv", "mlp", "unet"), is_cause=True)
POISONED = Fault("BN402", "statistics poisoned by it", run, ("resnet", "sequence"))
