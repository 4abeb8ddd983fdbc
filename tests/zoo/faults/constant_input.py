"""A loader that yields the same blank image; healthy: digits."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    def prepare(images):
        return torch.zeros_like(images) if is_faulty else images

    return train(build(architecture), prepare=prepare, prepare_evaluation=prepare, epochs=2)


FAULT = Fault("BN204", "a constant input", run, ("conv", "mlp"))
