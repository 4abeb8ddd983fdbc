"""Statistics frozen for the last epochs, as in quantisation-aware training: pytorch/pytorch#26624.

The weights go on learning with the statistics that they are evaluated with, which are no longer
those of the batches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits


class Rounded(torch.autograd.Function):
    """Rounds weights to 8 bits, and lets the gradient pass."""

    @staticmethod
    def forward(ctx, weight):
        scale = weight.abs().amax() / 127
        return (weight / scale).round() * scale

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class FakeQuantised(nn.Module):
    """What a parametrisation rounds with."""

    def forward(self, weight):
        return Rounded.apply(weight)


def _healthy() -> Run:
    model, (images, labels) = conv_net(), digits()
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.utils.parametrize.register_parametrization(module, "weight", FakeQuantised())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for epoch in range(9):
        model.train()
        if epoch > 1:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        accuracy = evaluate(watch, images[1200:], labels[1200:])
    return watch.end(accuracy)


SITUATION = Situation(healthy=_healthy)
