"""A feature extractor frozen by ``requires_grad`` alone: pytorch/pytorch#86590.

A second head is trained on images of another scanner. The parameters of the features are frozen,
and their statistics follow the second scanner: the first head, which nobody touched, is lost.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, accuracy, shuffled, train
from tests.networks import conv_net, digits


def _train(*, is_in_eval_mode: bool) -> Run:
    images, labels = digits()
    model = conv_net()
    train(model, epochs=3)
    features, first = model[:-1].requires_grad_(False), model[-1]
    both = nn.Sequential(features, nn.Linear(128, 10))
    other = 1.0 - 0.4 * images.flip(-1)
    optimizer = torch.optim.SGD(both[1].parameters(), lr=0.05, momentum=0.9)
    watch = Watch(both, {"optimizer": optimizer})
    for _ in range(4):
        both.train()
        features.train(not is_in_eval_mode)
        for batch in shuffled(64)():
            optimizer.zero_grad()
            F.cross_entropy(both(other[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        both.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            accuracy(both, other[1200:], labels[1200:])
    return watch.end(accuracy(nn.Sequential(features, first), images[1200:], labels[1200:]))


SITUATION = Situation(
    healthy=partial(_train, is_in_eval_mode=True),
    faulty=partial(_train, is_in_eval_mode=False),
    cause="BN101",
)
