"""A model whose statistics are estimated anew by ``update_bn``: timgaripov/swa#10.

Watched from the first step, and again when it is evaluated with a monitor of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits


def _healthy() -> Run:
    model, (images, labels) = conv_net(), digits()
    averaged = AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(averaged, {"planned_steps": 76})
    for epoch in range(4):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            if epoch > 1:
                averaged.update_parameters(model)
            watch.monitor.step()
    update_bn(images[:1200].split(100), averaged)
    return watch.end(evaluate(watch, images[1200:], labels[1200:]))


SITUATION = Situation(healthy=_healthy)
