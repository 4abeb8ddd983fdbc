"""All layers but the last in eval mode, for another resolution: facebookresearch/FixRes#9.

A trained network is fine-tuned on data of another scale; its head and the last BN layer learn.
"""

from __future__ import annotations

from tests.field.situation import Run, Situation, train
from tests.field.teacher_without_buffers import pretrained
from tests.networks import digits


def _healthy() -> Run:
    images, model = 1.0 - 0.3 * digits()[0].flip(-1), pretrained()
    model[:-4].requires_grad_(False)

    def start() -> None:
        model.eval()
        model[7].train()

    return train(model, images=images, lr=0.01, start=start)


SITUATION = Situation(healthy=_healthy)
