"""Validation in batches of 2 or 3, because memory is short: bearpaw/pytorch-pose#53.

The statistics of so small a batch differ from the running ones by sampling alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import digits, mlp


def _healthy() -> Run:
    runs = [_with_batches_of(2), _with_batches_of(3)]
    return Run(
        min(run.accuracy for run in runs),
        tuple(finding for run in runs for finding in run.findings),
        tuple(code for run in runs for code in run.announced),
    )


def _with_batches_of(size: int) -> Run:
    model, (images, labels) = mlp(), digits()
    images = images.flatten(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(5):
        model.train()
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        accuracy = evaluate(watch, images[1200:], labels[1200:], size)
    return watch.end(accuracy)


SITUATION = Situation(healthy=_healthy)
