"""BN layers that are frozen in a network without pretrained weights: pytorch/vision#5443.

Frozen as they were built, they do nothing at all. With pretrained weights, it is what detectors
with small batches do, as in open-mmlab/mmdetection#5642.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from tests.field.situation import Run, Situation, shuffled, train
from tests.field.teacher_without_buffers import pretrained
from tests.networks import conv_net


def _train(*, is_pretrained: bool) -> Run:
    model = pretrained() if is_pretrained else conv_net()
    layers = [layer for layer in model if isinstance(layer, nn.BatchNorm2d)]

    def start() -> None:
        model.train()
        for layer in layers:
            layer.eval().requires_grad_(False)

    start()
    return train(model, start=start, batches=shuffled(8), epochs=1, lr=0.003)


SITUATION = Situation(
    healthy=partial(_train, is_pretrained=True),
    faulty=partial(_train, is_pretrained=False),
    cause="BN209",
)
