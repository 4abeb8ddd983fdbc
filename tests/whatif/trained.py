"""Networks that were really trained on digits, into a fault or into none."""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from bnguard.demo import DigitsNet
from tests.networks import conv_net, digits

TRAIN, EVALUATE = slice(0, 1200), slice(1200, None)


def training_images():
    return digits()[0][TRAIN]


def evaluation_images():
    return digits()[0][EVALUATE]


def accuracy(images):
    """Return a score: the share of the evaluation images, as they were prepared, that is right."""
    labels = digits()[1][EVALUATE]

    def score(model):
        model.eval()
        with torch.no_grad():
            right = [
                (model(x).argmax(1) == y).sum().item()
                for x, y in zip(images.split(128), labels.split(128), strict=True)
            ]
        return sum(right) / len(labels)

    return score


def fitted(model, *, batch_size=32, epochs=3, lr=0.05, prepare=lambda images: images, after=None):
    """Return the model, trained, in eval mode."""
    images, labels = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(1200).split(batch_size):
            if len(batch) == batch_size:
                optimizer.zero_grad()
                F.cross_entropy(model(prepare(images[batch])), labels[batch]).backward()
                optimizer.step()
        if after is not None:
            after()
    return model.eval()


def scanned(images, size):
    """Return images as each group of so many comes from a scanner of its own: gain and offset."""
    random = torch.Generator().manual_seed(1)

    def one(group):
        gain, offset = torch.rand(1, generator=random), torch.randn(1, generator=random)
        return group * (0.3 + 1.7 * gain) + 2.0 * offset

    return torch.cat([one(group) for group in images.split(size)])


@functools.cache
def healthy():
    torch.manual_seed(0)
    return fitted(conv_net())


@functools.cache
def unconverged():
    """A momentum so small that 69 % of the initial statistics are left."""
    torch.manual_seed(0)
    return fitted(DigitsNet(width=8), epochs=2, lr=0.02)


@functools.cache
def averaged():
    """A moving average of the weights, with the statistics from when it began."""
    torch.manual_seed(0)
    model = fitted(conv_net(), epochs=1)
    average = copy.deepcopy(model)

    def follow():
        with torch.no_grad():
            for mean, new in zip(average.parameters(), model.parameters(), strict=True):
                mean.lerp_(new, 0.8)

    fitted(model, epochs=3, lr=0.1, after=follow)
    return average


@functools.cache
def of_small_batches():
    """Six BN layers trained on batches of three, whose variances are far from those of the data."""
    torch.manual_seed(0)
    layers = [nn.Flatten()]
    for inputs in (64, 32, 32, 32, 32, 32):
        layers += [nn.Linear(inputs, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()]
    return fitted(nn.Sequential(*layers, nn.Linear(32, 10)), batch_size=3, epochs=1, lr=0.01)


@functools.cache
def of_scanners():
    """Every training batch comes from one scanner, which BN takes out."""
    torch.manual_seed(0)
    return fitted(conv_net(), epochs=5, prepare=lambda images: _one_scanner(images))


def _one_scanner(images):
    return images * (0.3 + 1.7 * torch.rand(1)) + 2.0 * torch.randn(1)


@functools.cache
def of_two_streams():
    """Each step forwards the images and bright negatives of them, in batches of their own."""
    torch.manual_seed(0)
    images, labels = digits()
    model = conv_net().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(4):
        for batch in torch.randperm(1200).split(32):
            if len(batch) == 32:
                optimizer.zero_grad()
                for inputs in (images[batch], 2.0 - images[batch]):
                    F.cross_entropy(model(inputs), labels[batch]).backward()
                optimizer.step()
    return model.eval()


def in_turn(images, size):
    """Return images, every other group of which is a bright negative."""
    groups = images.split(size)
    return torch.cat([2.0 - group if i % 2 else group for i, group in enumerate(groups)])


@functools.cache
def with_dropout():
    """Dropout before each of three BN layers."""
    torch.manual_seed(0)
    layers = [nn.Flatten()]
    for inputs in (64, 32, 32):
        layers += [nn.Linear(inputs, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.ReLU()]
    return fitted(nn.Sequential(*layers, nn.Linear(32, 10)), epochs=4)


class Residual(nn.Module):
    """A block that changes its input a little, with a BN layer."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.bn = nn.BatchNorm1d(width)

    def forward(self, x):
        return x + 0.3 * self.bn(self.linear(x)).relu()


@functools.cache
def deep():
    """A network of 32 BN layers."""
    torch.manual_seed(0)
    blocks = [Residual(32) for _ in range(32)]
    return fitted(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 32), *blocks, nn.Linear(32, 10)), epochs=2
    )
