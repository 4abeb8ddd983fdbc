"""Gamma and beta are frozen, and nothing else: open-mmlab/mmdetection#346.

There are two switches, ``frozen`` for gradients and ``norm_eval`` for statistics. With the first
alone, the weights before each layer are trained, and its statistics have to follow.
"""

from __future__ import annotations

from torch import nn

from tests.field.situation import Run, Situation, train
from tests.networks import conv_net


def _healthy() -> Run:
    model = conv_net()
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)
    return train(model)


SITUATION = Situation(healthy=_healthy)
