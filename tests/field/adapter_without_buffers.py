"""An adapter is saved without the buffers of its base: huggingface/peft#1732.

The base is frozen, and its running statistics follow the adapter and the new data; on loading, they
are those of the pretraining again.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard
from tests.field.situation import Run, Situation, Watch, accuracy, evaluate, shuffled
from tests.field.teacher_without_buffers import pretrained
from tests.networks import digits


class Adapted(nn.Module):
    """A frozen convolution and a product of two small ones beside it."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(
            base.in_channels, 8, base.kernel_size, base.stride, base.padding, bias=False
        )
        self.up = nn.Conv2d(8, base.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, values: Tensor) -> Tensor:
        return self.base(values) + self.up(self.down(values))


def _loaded(*, with_buffers: bool) -> Watch:
    model, (images, labels) = pretrained(), digits()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for i in (0, 3, 6):
        model[i] = Adapted(model[i])
        model[i + 1].requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    model.train()
    for _ in range(4):
        for batch in shuffled(64)():
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    if not with_buffers:
        model.load_state_dict(before, strict=False)
    return Watch(model)


def _run(*, with_buffers: bool) -> Run:
    images, labels = digits()
    watch = _loaded(with_buffers=with_buffers)
    return watch.end(evaluate(watch, images[1200:], labels[1200:]))


def _recalibrated() -> float:
    images, labels = digits()
    model = _loaded(with_buffers=False).model
    bnguard.recalibrate(model, list(images[:1200].split(64)))
    return accuracy(model.eval(), images[1200:], labels[1200:])


SITUATION = Situation(
    healthy=partial(_run, with_buffers=True),
    faulty=partial(_run, with_buffers=False),
    cause="BN301",
    repaired=_recalibrated,
)
