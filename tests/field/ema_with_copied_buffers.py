"""An average of weights that copies the buffers, beside its model: pytorch/ignite#2592."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

import bnguard
from tests.field.situation import Run, Situation, accuracy
from tests.networks import conv_net, digits


def _healthy() -> Run:
    model, (images, labels) = conv_net(), digits()
    averaged = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5 * 38)
    for _ in range(5):
        for batch in torch.randperm(1200).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for own, new in zip(averaged.parameters(), model.parameters(), strict=True):
                    own.lerp_(new, 0.02)
                for own, new in zip(averaged.buffers(), model.buffers(), strict=True):
                    own.copy_(new)
    averaged.eval()
    report = bnguard.inspect(averaged, reference=model)
    return Run(accuracy(averaged, images[1200:], labels[1200:]), report.findings)


SITUATION = Situation(healthy=_healthy)
