"""A meta-learner whose inner loop works on copies: facebookresearch/higher#103.

The outer gradients reach the parameters of the model; the running statistics are updated in the
copies and thrown away with them. In eval mode the accuracy is that of guessing.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.func import functional_call

from tests.field.situation import Run, Situation, train
from tests.networks import conv_net, digits


def _train(*, copies_buffers: bool) -> Run:
    images, labels = digits()
    model = conv_net()

    def loss(batch: torch.Tensor) -> torch.Tensor:
        state = {name: value.clone() for name, value in model.named_parameters()}
        if copies_buffers:
            state |= {name: value.clone() for name, value in model.named_buffers()}
        support, query = batch.chunk(2)
        inner = F.cross_entropy(functional_call(model, state, images[support]), labels[support])
        names = [name for name, _ in model.named_parameters()]
        gradients = torch.autograd.grad(inner, [state[name] for name in names], create_graph=True)
        adapted = {
            name: state[name] - 0.1 * gradient
            for name, gradient in zip(names, gradients, strict=True)
        }
        return F.cross_entropy(
            functional_call(model, state | adapted, images[query]), labels[query]
        )

    return train(model, loss=loss)


SITUATION = Situation(
    healthy=partial(_train, copies_buffers=False),
    faulty=partial(_train, copies_buffers=True),
    cause="BN304",
)
