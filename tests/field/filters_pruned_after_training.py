"""Filters are set to zero after training, without a step: he-y/filter-pruning-geometric-median#27.

A pruned channel still has the mean and the variance that it had, so that it says something else.
The loop reports nothing, and evaluates twice after its last step. What recomputes the statistics,
as in huggingface/pytorch-image-models#224, is noticed too.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from tests.field.situation import Run, Situation, Watch, accuracy, shuffled
from tests.networks import conv_net, digits


@torch.no_grad()
def _prune(model: nn.Sequential) -> None:
    """Set those filters of a layer to zero that have the smallest norm, a third of them."""
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            norms = layer.weight.flatten(1).norm(dim=1)
            layer.weight[norms.argsort()[: len(norms) // 3]] = 0.0


def _train(*, updates: bool) -> Run:
    model, (images, labels) = conv_net(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(4):
        model.train()
        for batch in shuffled(64)():
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        model.eval()
        accuracy(model, images[1200:], labels[1200:])
    _prune(model)
    if updates:
        update_bn([images[batch] for batch in shuffled(64)()], model)
    model.eval()
    return watch.end(accuracy(model, images[1200:], labels[1200:]))


SITUATION = Situation(
    healthy=partial(_train, updates=True),
    faulty=partial(_train, updates=False),
    cause="BN304",
)
