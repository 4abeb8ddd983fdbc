"""Momentum in the convention of Keras."""

from __future__ import annotations

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import sgd, train


def run(is_faulty, architecture):
    model = build(architecture, momentum=0.99 if is_faulty else 0.1)
    # Slowly: the statistics of a ResNet lag after two epochs at 0.05, as some processors round.
    return train(model, optimizer=sgd(model, 0.02), epochs=2)


FAULT = Fault("BN103", "momentum 0.99", run, ("mlp", "resnet", "volumes"), is_cause=True)
