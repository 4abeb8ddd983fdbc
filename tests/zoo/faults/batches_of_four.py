"""Four samples a batch."""

from __future__ import annotations

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    size = 4 if is_faulty else 32
    return train(build(architecture), batch_size=size, epochs=4, max_steps=150)


FAULT = Fault("BN202", "batches of four", run, ("mlp",))
