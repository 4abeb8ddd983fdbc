"""Batches sorted by class; healthy: shuffled."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import shuffled, train


def sorted_by_class(labels):
    return torch.argsort(labels, stable=True)


def run(is_faulty, architecture):
    return train(build(architecture), order=sorted_by_class if is_faulty else shuffled)


FAULT = Fault(
    "BN203",
    "batches sorted by class",
    run,
    ("conv", "mlp", "resnet", "sequence"),
    is_cause=True,
)
