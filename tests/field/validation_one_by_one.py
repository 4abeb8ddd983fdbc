"""Inputs scaled in training alone, validated one by one, as in bearpaw/pytorch-pose#4.

The normalisation of the images was part of the training pipeline only; the loss of validation was
very large, and small in train mode. With batch size 1 a call has one value per channel.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch
from tests.networks import digits, mlp


def _train(*, is_scaled_in_validation: bool) -> Run:
    images, labels = digits()
    raw = 16.0 * images.flatten(1)
    scaled = (raw - 5.0) / 6.0
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    validation = (scaled if is_scaled_in_validation else raw)[1200:]
    for _ in range(4):
        model.train()
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(scaled[batch]), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        model.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            scores = torch.cat([model(sample) for sample in validation.split(1)])
    return watch.end((scores.argmax(1) == labels[1200:]).float().mean().item())


SITUATION = Situation(
    healthy=partial(_train, is_scaled_in_validation=True),
    faulty=partial(_train, is_scaled_in_validation=False),
    cause="BN305",
)
