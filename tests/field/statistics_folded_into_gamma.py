"""A frozen backbone whose running statistics are 0 and 1: open-mmlab/mmdetection#1217.

There they are folded into gamma and beta, and all is well. In TengdaHan/DPC#10 they were not saved
with the weights, and ``strict=False`` loads the rest.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from tests.field.situation import Run, Situation, train
from tests.field.teacher_without_buffers import pretrained


def _train(*, folds: bool) -> Run:
    model = pretrained()
    _remove_statistics(model, folds=folds)
    model[:-1].requires_grad_(False)

    def start() -> None:
        model.train()
        model[:-1].eval()

    return train(model, start=start, epochs=3)


@torch.no_grad()
def _remove_statistics(model: nn.Sequential, *, folds: bool) -> None:
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            if folds:
                scale = layer.weight / (layer.running_var + layer.eps).sqrt()
                layer.bias -= layer.running_mean * scale
                layer.weight.copy_(scale)
            layer.reset_running_stats()


SITUATION = Situation(
    healthy=partial(_train, folds=True),
    faulty=partial(_train, folds=False),
    cause="BN304",
)
