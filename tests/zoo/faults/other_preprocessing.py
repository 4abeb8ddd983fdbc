"""Evaluation without the preprocessing of training."""

from __future__ import annotations

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def prepared(images):
    return (images - 0.3) / 0.37


def run(is_faulty, architecture):
    return train(
        build(architecture),
        prepare=prepared,
        prepare_evaluation=(lambda images: 3.0 * images + 1.0) if is_faulty else prepared,
    )


FAULT = Fault(
    "BN305",
    "other preprocessing in evaluation",
    run,
    ("conv", "mlp", "resnet", "depthwise", "volumes", "sequence"),
    False,
    is_cause=True,
)
