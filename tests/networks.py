"""Small networks and real data that the tests share."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bnguard


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """The handwritten digits of scikit-learn, shuffled: images in [0, 1] and labels."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return images[order], torch.tensor(data.target)[order]


def conv_net(width: int = 8, momentum: float | None = 0.1) -> nn.Sequential:
    """A convolutional network for 8x8 images with three BN layers: 1, 4 and 7."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width, momentum=momentum),
        nn.ReLU(),
        nn.Conv2d(2 * width, 4 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4 * width, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * width, 10),
    )


def mlp(width: int = 16) -> nn.Sequential:
    """A network of two BatchNorm1d layers, 1 and 4, for the 64 pixels of a digit."""
    return nn.Sequential(
        nn.Linear(64, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def train(
    model: nn.Module,
    monitor: bnguard.Monitor,
    *,
    batch_size: int = 64,
    epochs: int = 3,
    lr: float = 0.05,
    flat: bool = False,
) -> float:
    """Train on 1,200 digits, evaluate on 597 after each epoch, and return the last accuracy."""
    images, labels = digits()
    if flat:
        images = images.flatten(1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(1200).split(batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
            monitor.step()
        model.eval()
        with torch.no_grad(), monitor.evaluation():
            scores = torch.cat([model(part) for part in images[1200:].split(128)])
    return (scores.argmax(1) == labels[1200:]).float().mean().item()
