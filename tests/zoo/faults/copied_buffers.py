"""Training through functional_call on copies of the buffers."""

from __future__ import annotations

from torch.func import functional_call

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def run(is_faulty, architecture):
    model = build(architecture)

    def forward(model, images):
        if not is_faulty:
            return model(images)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return functional_call(model, buffers, (images,))

    return train(model, forward=forward, epochs=2)


FAULT = Fault("BN304", "updates on copies of the buffers", run, ("conv",), is_cause=True)
