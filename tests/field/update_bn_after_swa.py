"""An averaged model after ``update_bn``, the function of pytorch/pytorch#35032.

Its counter is low and its statistics are exact: they are a plain average over one epoch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

import bnguard
from tests.field.situation import Run, Situation, accuracy
from tests.networks import conv_net, digits


def _healthy() -> Run:
    model, (images, labels) = conv_net(), digits()
    return _inspected(model, images, labels)


def _inspected(model, images, labels) -> Run:
    images = 3.0 * images + 1.0
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for epoch in range(4):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        if epoch > 1:
            averaged.update_parameters(model)
    update_bn(images[:1200].split(100), averaged)
    averaged.eval()
    report = bnguard.inspect(averaged)
    return Run(accuracy(averaged, images[1200:], labels[1200:]), report.findings)


SITUATION = Situation(healthy=_healthy)
