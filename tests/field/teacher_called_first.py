"""A target network in train mode that each step calls first, as lucidrains/byol-pytorch#73 has it.

Its parameters follow the online network, and its statistics are of its own batches, which are those
of training. The target is what is evaluated: lightly-ai/lightly#1471. Steps and evaluations are
noticed, and the first forward after an evaluation has no gradients.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, accuracy, shuffled
from tests.networks import conv_net, digits


def _healthy() -> Run:
    images, labels = digits()
    online = conv_net()
    target = copy.deepcopy(online).requires_grad_(False)
    pair = nn.ModuleDict({"online": online, "target": target})
    optimizer = torch.optim.SGD(online.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(pair, {"optimizer": optimizer})
    for _ in range(4):
        pair.train()
        for batch in shuffled(64)():
            optimizer.zero_grad()
            with torch.no_grad():
                expected = target(images[batch] + 0.1 * torch.randn(len(batch), 1, 8, 8))
            scores = online(images[batch])
            loss = F.mse_loss(scores.softmax(1), expected.softmax(1))
            (F.cross_entropy(scores, labels[batch]) + loss).backward()
            optimizer.step()
            with torch.no_grad():
                for own, new in zip(target.parameters(), online.parameters(), strict=True):
                    own.lerp_(new, 0.05)
        pair.eval()
        last = accuracy(target, images[1200:], labels[1200:])
    return watch.end(last)


SITUATION = Situation(healthy=_healthy)
