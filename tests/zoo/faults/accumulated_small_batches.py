"""Accumulation over batches of 4; healthy: over batches of 32."""

from __future__ import annotations

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    return train(build(architecture), batch_size=4 if is_faulty else 32, accumulated=4, epochs=2)


FAULT = Fault("BN107", "accumulation over batches of 4", run, ("conv", "resnet"))
