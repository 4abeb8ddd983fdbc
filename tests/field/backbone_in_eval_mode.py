"""Fine-tuning a head on a backbone in eval mode, as ultralytics/ultralytics#8753 advises.

The statistics of the backbone are those of other data, on purpose; training and evaluation use the
same ones, and the head has learnt with them. open-mmlab/mmsegmentation#362 asks for the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch
from tests.networks import conv_net, digits


def _pretrained() -> nn.Sequential:
    """Return a network that learnt digits of another scanner: darker, inverted, noisy."""
    model, (images, labels) = conv_net(), digits()
    images = 1.0 - 0.5 * images + 0.2 * torch.randn_like(images)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model


def _healthy() -> Run:
    model, (images, labels) = _pretrained(), digits()
    model[:-1].requires_grad_(False)
    model[-1].reset_parameters()
    optimizer = torch.optim.AdamW(model[-1].parameters(), lr=0.02)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(5):
        model.train()
        model[:-1].eval()
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        model.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            scores = torch.cat([model(part) for part in images[1200:].split(128)])
    return watch.end((scores.argmax(1) == labels[1200:]).float().mean().item())


SITUATION = Situation(healthy=_healthy)
