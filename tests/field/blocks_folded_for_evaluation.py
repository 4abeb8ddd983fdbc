"""Blocks that fold BN into their convolution in eval mode: DingXiaoH/RepVGG#9.

Folded, a block computes what it would with the layer, which it does not call. In
YeongHyeon/RepVGG-TF2#1 the convolution is taken alone, without what BN adds to it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, train


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, folds: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self._folds = folds
        self._folded: tuple[torch.Tensor, torch.Tensor] | None = None

    def train(self, mode: bool = True) -> _Block:
        super().train(mode)
        self._folded = None if mode else self._fold()
        return self

    @torch.no_grad()
    def _fold(self) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._folds:
            return self.conv.weight, torch.zeros_like(self.norm.bias)
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        shift = self.norm.bias - self.norm.running_mean * scale
        return self.conv.weight * scale[:, None, None, None], shift

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self._folded is None:
            return F.relu(self.norm(self.conv(images)))
        return F.relu(F.conv2d(images, *self._folded, stride=2, padding=1))


def _train(*, folds: bool) -> Run:
    blocks = [_Block(*sizes, folds=folds) for sizes in ((1, 16), (16, 32))]
    return train(nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128, 10)))


SITUATION = Situation(
    healthy=partial(_train, folds=True),
    faulty=partial(_train, folds=False),
    cause="BN306",
)
