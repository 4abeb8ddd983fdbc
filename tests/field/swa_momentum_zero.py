"""Weight averaging that re-estimates with momentum 0: Lightning-AI/pytorch-lightning#14866.

The callback resets the statistics and sets momentum to 0 in the place of None, for an epoch without
a learning rate; then it puts momentum back, so that nothing of the cause is left at the end.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import bnguard
from tests.field.situation import Run, Situation, Watch, accuracy, evaluate
from tests.networks import conv_net, digits


def _train(
    model: nn.Module, averaging_momentum: float | None, *, evaluates_averaging: bool = False
) -> Run:
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    watch = Watch(model, {"optimizer": optimizer})
    for epoch in range(4):
        model.train()
        if epoch == 3:
            optimizer.param_groups[0]["lr"] = 0.0
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = averaging_momentum
        for batch in torch.randperm(1200).split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        if epoch < 3 or evaluates_averaging:
            evaluate(watch, images[1200:], labels[1200:])
    for norm in norms:
        norm.momentum = 0.1
    return watch.end(evaluate(watch, images[1200:], labels[1200:]))


def _repaired() -> float:
    model, (images, labels) = conv_net(), digits()
    _train(model, 0.0)
    bnguard.recalibrate(model, images[:1200].split(100))
    return accuracy(model.eval(), images[1200:], labels[1200:])


def situation(*, evaluates_averaging: bool) -> Situation:
    """Return the situation with or without an evaluation before momentum is put back."""

    def train(momentum: float | None) -> Run:
        return _train(conv_net(), momentum, evaluates_averaging=evaluates_averaging)

    return Situation(
        healthy=partial(train, None),
        faulty=partial(train, 0.0),
        cause="BN304",
        repaired=_repaired,
    )


SITUATION = situation(evaluates_averaging=False)
