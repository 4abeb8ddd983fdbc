"""A layer that is called in training alone, by its place in the network; healthy: in both modes."""

from __future__ import annotations

from functools import partial

from torch import nn

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import norms, train


class InTraining(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, values):
        return self.norm(values) if self.training else values


def run(is_faulty, architecture, *, place):
    model = build(architecture)
    if is_faulty:
        for layer in list(norms(model))[place]:
            name = next(name for name, module in model.named_modules() if module is layer)
            model.set_submodule(name, InTraining(layer))
    return train(model, epochs=2)


FAULT = Fault(
    "BN306",
    "skipped in evaluation",
    partial(run, place=slice(None)),
    ("conv", "mlp"),
    shows_early=False,
)
FIRST = Fault(
    "BN306",
    "first layer skipped in evaluation",
    partial(run, place=slice(1)),
    ("conv", "mlp"),
    shows_early=False,
    is_cause=True,
)
