"""Weights averaged over the epochs, evaluated with the statistics of the last."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import sgd, train


def run(is_faulty, architecture):
    model = build(architecture)
    optimizer = sgd(model, lr=0.5)
    past = []

    def start_evaluation(model):
        model.eval()
        past.append([parameter.detach().clone() for parameter in model.parameters()])
        if not is_faulty or len(past) < 4:
            return
        with torch.no_grad():
            for parameter, *values in zip(model.parameters(), *past, strict=True):
                parameter.copy_(torch.stack(values).mean(0))

    return train(model, optimizer=optimizer, start_evaluation=start_evaluation)


FAULT = Fault("BN304", "averaged weights", run, ("conv", "mlp"), False, is_cause=True)
