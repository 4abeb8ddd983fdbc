"""Pretrained layers with momentum 0, fine-tuned on other data: Cadene/pretrained-models.pytorch#5.

The weights follow the new data, and the running statistics stay those of the old.
"""

from __future__ import annotations

from tests.field.situation import Run, Situation, train
from tests.field.teacher_without_buffers import pretrained


def _train(momentum: float) -> Run:
    model = pretrained()
    for layer in (model[1], model[4], model[7]):
        layer.momentum = momentum
    return train(model)


SITUATION = Situation(
    healthy=lambda: _train(0.1),
    faulty=lambda: _train(0.0),
    cause="BN103",
)
