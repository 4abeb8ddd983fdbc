"""A validation in mid-epoch after which nobody calls ``train()``: joeynmt/joeynmt#184.

Each epoch begins in train mode, and goes on in eval mode for its second part; less than half of all
steps. The healthy code puts the mode back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits


def _run(*, is_put_back: bool) -> Run:
    model, (images, labels) = conv_net(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(4):
        model.train()
        for number, batch in enumerate(torch.randperm(1200).split(16)):
            if number == 50:
                evaluate(watch, images[1200:1400], labels[1200:1400])
                model.train(is_put_back)
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
    return watch.end(evaluate(watch, images[1200:], labels[1200:]))


def named() -> Run:
    """Run the code as reported, which on digits does little harm."""
    return _run(is_put_back=False)


def _healthy() -> Run:
    return _run(is_put_back=True)


SITUATION = Situation(healthy=_healthy)
