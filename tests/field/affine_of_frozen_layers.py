"""BN layers in eval mode whose gamma and beta go on learning, on purpose: idstcv/SoftTriple#4.

Mean and variance are those of the pretraining, and the weights are fitted to the new data.
filipradenovic/cnnimageretrieval-pytorch#19 does the same.
"""

from __future__ import annotations

from torch import nn

from tests.field.situation import Run, Situation, train
from tests.field.teacher_without_buffers import pretrained


def _healthy() -> Run:
    model = pretrained()

    def start() -> None:
        model.train()
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    return train(model, start=start, lr=0.005, epochs=6)


SITUATION = Situation(healthy=_healthy)
