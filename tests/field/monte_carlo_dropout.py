"""Monte Carlo dropout by ``model.train()``, which lightning-uq-box/lightning-uq-box#173 avoids.

Between epochs, the uncertainty of unlabelled images of another scanner is estimated by several
passes in train mode: BN layers take their statistics in, too.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch
from tests.networks import conv_net, digits


def _train(*, is_by_dropout_alone: bool) -> Run:
    images, labels = digits()
    pool = 0.25 * images[1200:] + 0.75
    model = nn.Sequential(*conv_net()[:-1], nn.Dropout(0.3), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(4):
        model.train()
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        if is_by_dropout_alone:
            model.eval()
            model[-2].train()
        with torch.no_grad():
            for part in pool.split(64):
                torch.stack([model(part) for _ in range(2)]).softmax(2).var(0)
        model.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            scores = torch.cat([model(part) for part in images[1200:].split(64)])
    return watch.end((scores.argmax(1) == labels[1200:]).float().mean().item())


SITUATION = Situation(
    healthy=partial(_train, is_by_dropout_alone=True),
    faulty=partial(_train, is_by_dropout_alone=False),
    cause="BN206",
)
