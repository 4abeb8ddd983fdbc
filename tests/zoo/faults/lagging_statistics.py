"""Statistics that lag behind fast weights."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    model = build(architecture, momentum=0.02 if is_faulty else 0.1)

    def before_step(model, step):
        # A bias that travels, as those before the last layers of a regression do.
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                    module.weight.mul_(1.03 if step > 120 and is_faulty else 1.0)

    return train(model, before_step=before_step, epochs=5)


FAULT = Fault("BN301", "statistics that lag behind the weights", run, ("conv", "mlp"), False)
