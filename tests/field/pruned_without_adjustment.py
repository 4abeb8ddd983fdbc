"""A pruned network with the statistics of the whole one: csyhhu/L-OBS#14.

Its authors run training data through the network in train mode after pruning, without a step;
openvinotoolkit/nncf#46 has the figures of such an adaptation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import bnguard
from tests.field.situation import Run, Situation, Watch, accuracy, evaluate, shuffled
from tests.networks import conv_net, digits


def _pruned(share: float) -> Watch:
    model, (images, labels) = conv_net(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(4):
        model.train()
        for batch in shuffled(64)():
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
    model.eval()
    with torch.no_grad():
        for layer in (model[3], model[6]):
            layer.weight.mul_(layer.weight.abs() >= layer.weight.abs().quantile(share))
    return watch


def _run(share: float) -> Run:
    images, labels = digits()
    watch = _pruned(share)
    return watch.end(evaluate(watch, images[1200:], labels[1200:]))


def _recalibrated() -> float:
    images, labels = digits()
    model = _pruned(0.85).model
    bnguard.recalibrate(model, list(images[:1200].split(64)))
    return accuracy(model.eval(), images[1200:], labels[1200:])


SITUATION = Situation(
    healthy=lambda: _run(0.0), faulty=lambda: _run(0.85), cause="BN304", repaired=_recalibrated
)
