"""An evaluation inside the epoch that puts every module in train mode: ContinualAI/avalanche#772.

The adapted model holds its BN layers in eval mode, since a batch of its stream has one class. After
the first periodic evaluation they are in train mode.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, accuracy, evaluate, train
from tests.networks import digits, mlp


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = digits()
    return images.flatten(1), labels


def _evaluate(watch: Watch, *, restores: bool) -> float:
    images, labels = _data()
    modes = [(module, module.training) for module in watch.model.modules()]
    last = evaluate(watch, images[1200:], labels[1200:])
    watch.model.train()
    if restores:
        for module, mode in modes:
            module.training = mode
    return last


def _train(*, restores: bool) -> Run:
    images, labels = _data()
    model = mlp(32)
    train(model, images=images)
    layers = [module for module in model if isinstance(module, nn.BatchNorm1d)]
    optimizer = torch.optim.SGD(model.parameters(), lr=2e-4)
    watch = Watch(model, {"optimizer": optimizer})
    model.train()
    for layer in layers:
        layer.eval()
    for i in range(150):
        stream = torch.nonzero(labels[:1200] == i // 15)
        batch = stream[torch.randint(len(stream), (16,)), 0]
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        watch.monitor.step()
        if i % 50 == 49:
            _evaluate(watch, restores=restores)
    model.eval()
    return watch.end(accuracy(model, images[1200:], labels[1200:]))


SITUATION = Situation(
    healthy=partial(_train, restores=True),
    faulty=partial(_train, restores=False),
    cause="BN208",
)
