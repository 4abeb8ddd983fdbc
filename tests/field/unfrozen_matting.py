"""``freeze_bn()`` called once, before a ``train()`` that undoes it: poppinace/indexnet_matting#35.

The pretrained layers were to stay frozen because a batch holds four crops of one photograph.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, train
from tests.networks import digits, mlp


def _train(*, freezes_each_epoch: bool) -> Run:
    images, labels = digits()
    images = images.flatten(1)
    model = mlp(32)
    train(model, images=images)

    def freeze() -> None:
        for layer in (model[1], model[4]):
            layer.eval()

    def start() -> None:
        model.train()
        if freezes_each_epoch:
            freeze()

    def loss(batch: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(images[batch] + 0.1 * torch.rand(4, 1)), labels[batch])

    model.train()
    freeze()
    photographs = torch.randperm(150).repeat_interleave(4).split(4)
    return train(
        model, loss=loss, images=images, batches=lambda: photographs, lr=2e-4, epochs=2, start=start
    )


SITUATION = Situation(
    healthy=partial(_train, freezes_each_epoch=True),
    faulty=partial(_train, freezes_each_epoch=False),
    cause="BN208",
)
