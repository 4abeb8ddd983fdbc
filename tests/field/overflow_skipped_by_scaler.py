"""A gradient scaler skips the step that overflowed; BN does not: pytorch/pytorch#88474.

The optimizer never sees the batch, and training goes on; its infinite values are in the running
statistics for good, and show in validation only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch, evaluate, shuffled
from tests.networks import conv_net, digits


def _train(*, overflows: bool, restores: bool = False) -> Run:
    images, labels = digits()
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer, "restore_poisoned": restores})
    step = 0
    for _ in range(3):
        model.train()
        for batch in shuffled(64)():
            scale = 1e38 if overflows and step == 20 else 1.0
            optimizer.zero_grad()
            F.cross_entropy(model(scale * images[batch]), labels[batch]).backward()
            if all(p.grad.isfinite().all() for p in model.parameters()):
                optimizer.step()
            watch.monitor.step()
            step += 1
        accuracy = evaluate(watch, images[1200:], labels[1200:])
    return watch.end(accuracy)


SITUATION = Situation(
    healthy=lambda: _train(overflows=False),
    faulty=lambda: _train(overflows=True),
    cause="BN401",
    repaired=lambda: _train(overflows=True, restores=True).accuracy,
)
