"""Fine-tuning a head on a backbone in eval mode, as ultralytics/ultralytics#8753 advises.

The statistics of the backbone are those of other data, on purpose; training and evaluation use the
same ones, and the head, which has BN of its own, has learnt with them. Others ask for the same in
open-mmlab/mmsegmentation#362.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits


def _fit(model, images, labels, optimizer, watch=None):
    for batch in torch.randperm(1200).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        if watch is not None:
            watch.monitor.step()


def _pretrained() -> nn.Sequential:
    """Return a network that learnt inverted, noisy digits."""
    model, (images, labels) = conv_net(), digits()
    images = 1.0 - 0.5 * images + 0.2 * torch.randn_like(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        _fit(model, images, labels, optimizer)
    return model


class Net(nn.Module):
    """A pretrained backbone that stays in eval mode, and a head that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = _pretrained()[:-1].requires_grad_(False)
        self.head = nn.Sequential(
            nn.Linear(128, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
        )

    def forward(self, images):
        return self.head(self.backbone(images))

    def train(self, mode=True):
        super().train(mode)
        self.backbone.eval()
        return self


def _healthy() -> Run:
    model, (images, labels) = Net(), digits()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(6):
        model.train()
        _fit(model, images, labels, optimizer, watch)
        accuracy = evaluate(watch, images[1200:], labels[1200:])
    return watch.end(accuracy)


SITUATION = Situation(healthy=_healthy)
