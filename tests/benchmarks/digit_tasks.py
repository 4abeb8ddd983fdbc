"""Networks that are trained on digits here, and what they are trained to do.

The data are scikit-learn's handwritten digits: 1,000 to train on, 200 to choose by, 597 to test.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnguard.demo import DigitsNet
from tests.networks import digits
from tests.zoo.architectures import build

TRAINING = slice(0, 1000)
VALIDATION = slice(1000, 1200)
TEST = slice(1200, None)


@dataclass(frozen=True)
class Task:
    """What a network is trained to do, and how well it does it."""

    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]

    def train(self, model: nn.Module, *, epochs: int, batch_size: int, lr: float) -> nn.Module:
        """Train with Adam, one cycle of the learning rate."""
        inputs, targets = self.inputs[TRAINING], self.targets[TRAINING]
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr)
        steps = epochs * (len(inputs) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(len(inputs)).split(batch_size):
                if len(batch) < batch_size:
                    continue
                optimizer.zero_grad()
                self.loss(model(inputs[batch]), targets[batch]).backward()
                optimizer.step()
                schedule.step()
        return model

    @torch.no_grad()
    def measure(self, model: nn.Module, part: slice) -> float:
        """Return the score in percent on a part of the data, in eval mode."""
        model.eval()
        outputs = torch.cat([model(batch) for batch in self.inputs[part].split(128)])
        return 100 * self.score(outputs, self.targets[part])

    def unlabelled(self, batch_size: int = 32) -> list[Tensor]:
        """Return the training inputs in batches, shuffled."""
        order = torch.randperm(len(self.inputs[TRAINING]))
        return list(self.inputs[TRAINING][order].split(batch_size))


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of samples, or pixels, whose highest score is their label's."""
    return (scores.argmax(1) == labels).float().mean().item()


def dice(scores: Tensor, mask: Tensor) -> float:
    """Dice coefficient of the pixels that are scored as ink and those that are."""
    found = scores.argmax(1) == 1
    return (2 * (found & (mask == 1)).sum() / (found.sum() + (mask == 1).sum())).item()


def classification(size: int = 8) -> Task:
    """Name the digit; images of 8x8 pixels, or enlarged."""
    images, labels = digits()
    if size != 8:
        images = F.interpolate(images, size=size, mode="bilinear")
    return Task(images, labels, F.cross_entropy, accuracy)


def segmentation(size: int = 8) -> Task:
    """Find the strokes of a digit in noise."""
    images, _ = digits()
    if size != 8:
        images = F.interpolate(images, size=size, mode="bilinear")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return Task(images + 0.3 * noise, (images[:, 0] > 0.4).long(), F.cross_entropy, dice)


@dataclass(frozen=True)
class Subject:
    """A network, its task, and how long it is trained with BN at batch size 32."""

    make: Callable[[], nn.Module]
    task: Callable[[], Task]
    epochs: int


class UNet(nn.Module):
    """Ronneberger et al. 2015, two levels down, BN after each convolution: 10 BN layers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList([_double(1, width), _double(width, 2 * width)])
        self.bottom = _double(2 * width, 4 * width)
        self.up = nn.ModuleList([_double(6 * width, 2 * width), _double(3 * width, width)])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return self.head(x)


def _double(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ResNet18(nn.Module):
    """He et al. 2016 with 20 BN layers, an eighth of the width, and the stem for small images."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = _normalised(1, width, 3)
        channels = [width * 2**stage for stage in (0, 0, 1, 2, 3)]
        self.blocks = nn.Sequential(
            *(
                _Residual(
                    channels[stage] if block == 0 else channels[stage + 1],
                    channels[stage + 1],
                    stride=2 if block == 0 and stage > 0 else 1,
                )
                for stage in range(4)
                for block in range(2)
            )
        )
        self.head = nn.Linear(channels[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _normalised(inputs, outputs, 3, stride=stride)
        self.second = _normalised(outputs, outputs, 3)
        is_same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if is_same else _normalised(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.shortcut(x))


class MobileNet(nn.Module):
    """MobileNetV2 (Sandler et al. 2018), narrow and with seven of its blocks: 23 BN layers."""

    def __init__(self) -> None:
        super().__init__()
        settings = (
            (16, 16, 1),
            (16, 24, 2),
            (24, 24, 1),
            (24, 32, 2),
            (32, 32, 1),
            (32, 48, 1),
            (48, 48, 1),
        )
        self.stem = nn.Sequential(_normalised(1, 16, 3), nn.ReLU6())
        self.blocks = nn.Sequential(*(_Inverted(*setting) for setting in settings))
        self.last = nn.Sequential(_normalised(48, 192, 1), nn.ReLU6())
        self.head = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.layers = nn.Sequential(
            _normalised(inputs, hidden, 1),
            nn.ReLU6(),
            _normalised(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.ReLU6(),
            _normalised(hidden, outputs, 1),
        )
        self.is_residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.is_residual else self.layers(x)


def _normalised(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _of_zoo(architecture: str, task: Callable[[], Task] = classification) -> Subject:
    return Subject(partial(build, architecture), task, epochs=15)


SUBJECTS: Mapping[str, Subject] = {
    "zoo mlp": _of_zoo("mlp"),
    "zoo conv": _of_zoo("conv"),
    "zoo resnet": _of_zoo("resnet"),
    "zoo depthwise": _of_zoo("depthwise"),
    "zoo sequence": _of_zoo("sequence"),
    "zoo volumes": _of_zoo("volumes"),
    "zoo siamese": _of_zoo("siamese"),
    "zoo unet": _of_zoo("unet", segmentation),
    "DigitsNet": Subject(partial(DigitsNet, width=8, momentum=0.1), classification, epochs=10),
    "ResNet-18": Subject(ResNet18, partial(classification, 16), epochs=8),
    "MobileNet": Subject(MobileNet, partial(classification, 12), epochs=10),
    "U-Net": Subject(UNet, partial(segmentation, 16), epochs=4),
}
