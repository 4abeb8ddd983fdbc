"""Accumulation over batches of 4, as in ultralytics/yolov5#1630: no streams.

That the batches are small is said; that they are several streams is not true.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import digits, mlp


def _healthy() -> Run:
    model, (images, labels) = mlp(), digits()
    images = images.flatten(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer, "accumulated_batches": 8})
    for _ in range(3):
        model.train()
        for number, batch in enumerate(torch.randperm(1200).split(4)):
            (F.cross_entropy(model(images[batch]), labels[batch]) / 8).backward()
            if number % 8 == 7:
                optimizer.step()
                optimizer.zero_grad()
                watch.monitor.step()
        accuracy = evaluate(watch, images[1200:], labels[1200:])
    run = watch.end(accuracy)
    small = {"BN107", "BN202"}
    return Run(
        accuracy,
        tuple(finding for finding in run.findings if finding.code not in small),
        tuple(code for code in run.announced if code not in small),
    )


SITUATION = Situation(healthy=_healthy)
