"""Momentum in the convention of Keras."""

from __future__ import annotations

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    return train(build(architecture, momentum=0.99 if is_faulty else 0.1), epochs=2)


FAULT = Fault("BN103", "momentum 0.99", run, ("mlp", "resnet", "volumes"), is_cause=True)
