"""Weight decay on gamma and beta."""

from __future__ import annotations

import torch

from bnguard.findings import Severity
from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import norms, train


def run(is_faulty, architecture):
    model = build(architecture)
    own = {id(part) for layer in norms(model) for part in layer.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in own], "weight_decay": 5e-4},
        {
            "params": [p for p in model.parameters() if id(p) in own],
            "weight_decay": 5e-4 if is_faulty else 0.0,
        },
    ]
    return train(model, optimizer=torch.optim.SGD(groups, lr=0.05, momentum=0.9), epochs=2)


FAULT = Fault("BN109", "weight decay on gamma", run, ("conv",), severity=Severity.INFO)
