"""So small a momentum that the initial statistics stay."""

from __future__ import annotations

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    return train(build(architecture, momentum=0.005 if is_faulty else 0.1))


FAULT = Fault(
    "BN303",
    "too few updates for the momentum",
    run,
    ("mlp", "conv", "resnet", "depthwise", "unet", "volumes", "sequence"),
    is_cause=True,
)
