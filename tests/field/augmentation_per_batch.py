"""One draw of the augmentation for all images of a batch: pytorch/vision#8484.

Transforms of a batched tensor draw once for all of it; on shuffled data that does no harm. The same
images in the order of their classes do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits

Augmentation = Callable[[torch.Tensor], torch.Tensor]


def brightness(images: torch.Tensor) -> torch.Tensor:
    return images + torch.empty(()).uniform_(-0.5, 0.5)


def scale(images: torch.Tensor) -> torch.Tensor:
    return images * torch.empty(()).uniform_(0.5, 1.5)


def erased_square(images: torch.Tensor) -> torch.Tensor:
    row, column = torch.randint(0, 6, (2,)).tolist()
    images = images.clone()
    images[:, :, row : row + 2, column : column + 2] = 0.0
    return images


def shift(images: torch.Tensor) -> torch.Tensor:
    return images.roll(int(torch.randint(-1, 2, ())), 3)


def train(augment: Augmentation, *, is_sorted: bool = False) -> Run:
    model, (images, labels) = conv_net(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer, "every_n_steps": 10})
    accuracy = 0.0
    for _ in range(6):
        model.train()
        order = labels[:1200].argsort(stable=True) if is_sorted else torch.randperm(1200)
        for batch in order.split(30):
            optimizer.zero_grad()
            F.cross_entropy(model(augment(images[batch])), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        accuracy = evaluate(watch, images[1200:], labels[1200:])
    return watch.end(accuracy)


SITUATION = Situation(
    healthy=lambda: train(brightness),
    faulty=lambda: train(brightness, is_sorted=True),
    cause="BN203",
)
