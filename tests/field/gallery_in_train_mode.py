"""Inference without ``eval()``, person by person: layumi/Person_reID_baseline_pytorch#218.

With batches like those of training the scores look good; with one identity a batch, normalising
takes out what the identity is known by.
"""

from __future__ import annotations

from functools import partial

import torch

from tests.field.situation import Run, Situation, Watch, train
from tests.networks import conv_net, digits


def _train(*, calls_eval: bool) -> Run:
    images, labels = digits()
    model = conv_net()
    train(model, epochs=3)
    watch = Watch(model)
    model.train(not calls_eval)
    order = labels[1200:].argsort() + 1200
    with torch.no_grad(), watch.monitor.evaluation():
        scores = torch.cat([model(images[part]) for part in order.split(8)])
    return watch.end((scores.argmax(1) == labels[order]).float().mean().item())


SITUATION = Situation(
    healthy=partial(_train, calls_eval=True),
    faulty=partial(_train, calls_eval=False),
    cause="BN206",
)
