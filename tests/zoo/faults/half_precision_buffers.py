"""A whole model cast to bfloat16 and trained; healthy: autocast."""

from __future__ import annotations

import torch

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train, unchanged


def run(is_faulty, architecture):
    model = build(architecture)
    if is_faulty:
        model.bfloat16()

    def prepare(images):
        return images.bfloat16() if is_faulty else images

    def forward(model, images):
        with torch.autocast("cpu", torch.bfloat16, enabled=not is_faulty):
            return model(images).float()

    return train(
        model,
        prepare=prepare,
        prepare_evaluation=prepare if is_faulty else unchanged,
        forward=forward,
        epochs=2,
    )


FAULT = Fault("BN105", "a model cast to bfloat16", run, ("conv", "mlp"))
