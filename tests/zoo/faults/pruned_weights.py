"""Weights pruned before evaluation."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    def start_evaluation(model):
        model.eval()
        if not is_faulty:
            return
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, torch.nn.Conv1d)):
                    bound = module.weight.abs().quantile(0.9)
                    module.weight.mul_(module.weight.abs() > bound)

    return train(build(architecture), start_evaluation=start_evaluation, epochs=3)


FAULT = Fault("BN304", "pruned weights", run, ("conv", "resnet", "mlp"), False, is_cause=True)
