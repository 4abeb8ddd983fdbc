"""Layers with an activation replaced by plain ones: huggingface/pytorch-image-models#1254.

As reported, a conversion drops the activation of ``BatchNormAct2d``. Here a function of the user's
own does, in the blocks that it freezes: pytorch/pytorch#187298 names such classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard
from tests.field.situation import Run, Situation
from tests.networks import digits


class BatchNormAct(nn.BatchNorm2d):
    """BN and its activation in one."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise and activate."""
        return self.act(super().forward(inputs))


class Block(nn.Module):
    """A convolution and what follows it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = BatchNormAct(outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Convolve and normalise."""
        return self.bn1(self.conv(inputs))


def _trained() -> nn.Sequential:
    images, labels = digits()
    head = (nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 10))
    model = nn.Sequential(Block(1, 8), Block(8, 16), Block(16, 16), *head)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def _replaced(old: BatchNormAct) -> nn.BatchNorm2d:
    new = nn.BatchNorm2d(old.num_features)
    new.load_state_dict(old.state_dict())
    return new.requires_grad_(False).eval()


def _accuracy(model: nn.Module) -> float:
    images, labels = digits()
    with torch.no_grad():
        return (model(images[1200:]).argmax(1) == labels[1200:]).float().mean().item()


def _run(model: nn.Module) -> Run:
    return Run(_accuracy(model), bnguard.inspect(model).findings)


def _faulty() -> Run:
    model = _trained()
    for block in model[:2]:
        block.bn1 = _replaced(block.bn1)
    return _run(model)


def _repaired() -> float:
    model = _trained()
    for block in model[:2]:
        block.bn1 = nn.Sequential(_replaced(block.bn1), nn.ReLU())
    return _accuracy(model)


SITUATION = Situation(
    healthy=lambda: _run(_trained()), faulty=_faulty, cause="BN108", repaired=_repaired
)
