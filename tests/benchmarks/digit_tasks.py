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
    """What a network is trained to do, and how well it does it.

    Attributes:
        inputs: Shape ``(N, 1, H, W)``.
        targets: Labels of the images or of their pixels, or images.
        loss: Of outputs and targets.
        score: Of outputs and targets, 1 at best.
        batch_size: Of the first training, and of the batches that are measured and teach.
    """

    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]
    batch_size: int = 32

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
        outputs = torch.cat([model(batch) for batch in self.inputs[part].split(self.batch_size)])
        return 100 * self.score(outputs, self.targets[part])

    def unlabelled(self) -> list[Tensor]:
        """Return the training inputs in batches, shuffled."""
        order = torch.randperm(len(self.inputs[TRAINING]))
        return list(self.inputs[TRAINING][order].split(self.batch_size))


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of samples, or pixels, whose highest score is their label's."""
    return (scores.argmax(1) == labels).float().mean().item()


def dice(scores: Tensor, mask: Tensor) -> float:
    """Dice coefficient of the pixels that are scored as ink and those that are."""
    found = scores.argmax(1) == 1
    return (2 * (found & (mask == 1)).sum() / (found.sum() + (mask == 1).sum())).item()


def closeness(found: Tensor, wanted: Tensor) -> float:
    """One minus the mean absolute error over that of the median image."""
    usual = (wanted - wanted.median(0).values).abs().mean()
    return 1 - ((found - wanted).abs().mean() / usual).item()


def restoration() -> Task:
    """Restore the digit from an image of another contrast and brightness, one at a time."""
    images, _ = digits()
    generator = torch.Generator().manual_seed(0)
    contrast = torch.rand(len(images), 1, 1, 1, generator=generator) * 3 + 0.3
    brightness = torch.randn(len(images), 1, 1, 1, generator=generator)
    return Task(
        images * contrast + 2 * brightness,
        images / images.max() * 2 - 1,
        F.l1_loss,
        closeness,
        batch_size=1,
    )


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
    """A network, its task, and how long it is trained with BN."""

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


class DenseNet(nn.Module):
    """Huang et al. 2017, small: each BN layer gets channels from all layers before it."""

    def __init__(self, width: int = 16, growth: int = 8, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        widths = [width + growth * index for index in range(depth + 1)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(w), nn.ReLU(), nn.Conv2d(w, growth, 3, padding=1))
            for w in widths[:-1]
        )
        self.last = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Inception(nn.Module):
    """Szegedy et al. 2015, small: branches of 7 and 11 channels, which few groups divide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _normalised(1, 11, 3)
        self.branches = nn.ModuleList(
            nn.ModuleList(_normalised(width, outputs, kernel) for outputs, kernel in _BRANCHES)
            for width in (11, 25, 25)
        )
        self.head = nn.Linear(25, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for index, branches in enumerate(self.branches):
            x = F.relu(torch.cat([branch(x) for branch in branches], 1))
            if index == 0:
                x = F.max_pool2d(x, 2)
        return self.head(x.mean((2, 3)))


# Channels and kernel size of each branch.
_BRANCHES = ((7, 1), (11, 3), (7, 5))


class Generator(nn.Module):
    """pix2pix (Isola et al. 2017), small: down to 2x2 pixels and up again."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)
            )
            for i, o in ((1, width), (width, 2 * width))
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()
            )
            for i, o in ((2 * width, width), (2 * width, width))
        )
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down[0](x)
        x = self.up[0](self.down[1](first))
        return torch.tanh(self.head(self.up[1](torch.cat([x, first], 1))))


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
    "DenseNet": Subject(DenseNet, classification, epochs=8),
    "Inception": Subject(Inception, classification, epochs=8),
    "generator": Subject(Generator, restoration, epochs=2),
}
