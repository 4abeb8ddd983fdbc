"""float16 autocast near the end of its range."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    model = build(architecture)
    whole = model.forward

    def forward(images):
        with torch.autocast("cpu", torch.float16):
            return whole(images).float()

    model.forward = forward

    def prepare(images):
        return images * (3e4 if is_faulty else 1.0)

    return train(model, prepare=prepare, prepare_evaluation=prepare, epochs=2)


FAULT = Fault("BN404", "float16 near its end", run, ("mlp",), False)
