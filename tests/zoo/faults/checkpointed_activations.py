"""Activation checkpointing, both kinds."""

from __future__ import annotations

from torch.utils.checkpoint import checkpoint

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    model = build("conv")
    first, rest = model[:6], model[6:]
    whole = model.forward

    def forward(images):
        if not is_faulty or not model.training:
            return whole(images)
        images = images.requires_grad_()
        return rest(checkpoint(first, images, use_reentrant=architecture == "reentrant"))

    model.forward = forward
    return train(model, epochs=2)


FAULT = Fault("BN205", "activation checkpointing", run, ("reentrant", "non-reentrant"))
