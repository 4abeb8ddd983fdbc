"""Dropout right before BN."""

from __future__ import annotations

from torch import nn

from bnguard.findings import Severity
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    norm, dropout = nn.BatchNorm1d(32), nn.Dropout(0.2)
    middle = [dropout, norm] if is_faulty else [norm, dropout]
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32, bias=False), *middle, nn.ReLU(), nn.Linear(32, 10)
    )
    return train(model, epochs=2)


FAULT = Fault("BN109", "dropout before BN", run, ("mlp",), severity=Severity.INFO)
