"""No eval() before evaluation."""

from __future__ import annotations

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import never, train


def run(is_faulty, architecture):
    return train(build(architecture), epochs=4, start_evaluation=never if is_faulty else None)


FAULT = Fault("BN206", "evaluation without eval()", run, ("conv", "unet", "mlp", "siamese"), False)
