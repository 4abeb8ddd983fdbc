"""A network that is timed with dummy images before it is evaluated: pytorch/vision#2079.

Without a step of any optimizer the predictions are others than before: the forwards in train mode
took their statistics from images of zeros.
"""

from __future__ import annotations

from functools import partial

import torch

from tests.field.situation import Run, Situation, Watch, evaluate, train
from tests.networks import conv_net, digits


def _run(*, is_timed_in_eval_mode: bool) -> Run:
    images, labels = digits()
    model = conv_net()
    train(model, epochs=3)
    watch = Watch(model)
    model.train(not is_timed_in_eval_mode)
    with torch.no_grad():
        for _ in range(30):
            model(torch.zeros(16, 1, 8, 8))
    return watch.end(evaluate(watch, images[1200:], labels[1200:]))


SITUATION = Situation(
    healthy=partial(_run, is_timed_in_eval_mode=True),
    faulty=partial(_run, is_timed_in_eval_mode=False),
    cause="BN206",
)
