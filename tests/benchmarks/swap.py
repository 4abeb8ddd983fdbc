"""What a network is worth after a swap: at once, distilled, and fine-tuned at batch size 2.

python -m tests.benchmarks.swap            all networks, about ten minutes on two cores
python -m tests.benchmarks.swap conv-net   some of them

Every network is trained here on scikit-learn's handwritten digits; figures are accuracies on 597
digits that no training has seen, or Dice for the U-Net, in percent.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnguard.demo import DigitsNet
from bnguard.fixes.swap import swap
from tests.networks import conv_net, digits, mlp

TRAINING = 1200
DISTILLING_STEPS = (50, 200, 500)
FINE_TUNING_RATES = (1e-4, 1e-3)


@dataclass(frozen=True)
class Task:
    """What a network is trained to do, and how well it does it."""

    inputs: Tensor
    targets: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    score: Callable[[Tensor, Tensor], float]

    def train(self, model: nn.Module, *, epochs: int, batch_size: int, lr: float) -> nn.Module:
        """Train with Adam, the learning rate falling to 0 along a cosine."""
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr)
        steps = epochs * (TRAINING // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        for _ in range(epochs):
            for batch in torch.randperm(TRAINING).split(batch_size):
                if len(batch) < batch_size:
                    continue
                optimizer.zero_grad()
                self.loss(model(self.inputs[batch]), self.targets[batch]).backward()
                optimizer.step()
                schedule.step()
        return model

    @torch.no_grad()
    def measure(self, model: nn.Module) -> float:
        """Return the score in percent on what no training has seen, in eval mode."""
        model.eval()
        outputs = torch.cat([model(part) for part in self.inputs[TRAINING:].split(128)])
        return 100 * self.score(outputs, self.targets[TRAINING:])

    def unlabelled(self, batch_size: int = 32) -> list[Tensor]:
        """Return the training inputs in batches."""
        return list(self.inputs[:TRAINING].split(batch_size))


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of samples whose highest score is their label's."""
    return (scores.argmax(1) == labels).float().mean().item()


def dice(logits: Tensor, mask: Tensor) -> float:
    """Dice coefficient of the mask at logit 0 and the true one."""
    found = logits > 0
    return (2 * (found & (mask > 0)).sum() / (found.sum() + (mask > 0).sum())).item()


def classification(size: int | None = None) -> Task:
    """Name the digit; images of 8x8 pixels, or enlarged to ``size``."""
    images, labels = digits()
    if size is not None:
        images = F.interpolate(images, size=size, mode="bilinear")
    return Task(images, labels, F.cross_entropy, accuracy)


def segmentation() -> Task:
    """Find the strokes of a digit in noise, images of 16x16 pixels."""
    images, _ = digits()
    images = F.interpolate(images, size=16, mode="bilinear")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return Task(
        images + 0.3 * noise,
        (images > 0.4).float(),
        F.binary_cross_entropy_with_logits,
        dice,
    )


class UNet(nn.Module):
    """Ronneberger et al. 2015, two levels down, BN after each convolution."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([_double(1, width), _double(width, 2 * width)])
        self.bottom = _double(2 * width, 4 * width)
        self.up = nn.ModuleList([_double(6 * width, 2 * width), _double(3 * width, width)])
        self.head = nn.Conv2d(width, 1, 1)

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
    """He et al. 2016 with 20 BN layers, a quarter of the width, and the stem for small images."""

    def __init__(self, width: int = 16) -> None:
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


class Depthwise(nn.Module):
    """MobileNetV2 (Sandler et al. 2018), narrow and with seven of its blocks: 23 BN layers."""

    def __init__(self) -> None:
        super().__init__()
        settings = [
            (16, 16, 1),
            (16, 24, 2),
            (24, 24, 1),
            (24, 32, 2),
            (32, 32, 1),
            (32, 48, 1),
            (48, 48, 1),
        ]
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


def flat_mlp() -> nn.Module:
    """The zoo's network of BatchNorm1d layers, on images."""
    return nn.Sequential(nn.Flatten(), mlp(64))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Task], int]] = {
    "conv-net": (partial(conv_net, 16), classification, 10),
    "mlp": (flat_mlp, classification, 20),
    "digits-net": (partial(DigitsNet, momentum=0.1), classification, 10),
    "unet": (UNet, segmentation, 3),
    "resnet18": (ResNet18, partial(classification, 16), 5),
    "depthwise": (Depthwise, partial(classification, 16), 8),
}


def opacus_fixed(model: nn.Module) -> nn.Module | None:
    """What Opacus' ``ModuleValidator.fix`` makes of a model; None where it is not installed."""
    try:
        from opacus.validators import ModuleValidator
    except ImportError:
        return None
    return ModuleValidator.fix(copy.deepcopy(model))


def variants(model: nn.Module, task: Task) -> Iterator[tuple[str, nn.Module | None]]:
    """Yield the network with BN, and what each way of swapping makes of it."""
    yield "BN", copy.deepcopy(model)
    yield "naive swap", swap(model, "group", sample=task.inputs[:64]).model
    yield "Opacus", opacus_fixed(model)
    for steps in DISTILLING_STEPS:
        data = task.unlabelled()
        taught = swap(model, "group", teacher_data=data, steps=steps, progress=False)
        yield f"{steps} steps", taught.model


def compare(name: str) -> list[tuple[str, float, float]]:
    """Return the ways of a network: name, score, score after an epoch at batch size 2."""
    make, make_task, epochs = NETWORKS[name]
    torch.manual_seed(0)
    task = make_task()
    model = task.train(make(), epochs=epochs, batch_size=32, lr=3e-3).eval()
    rows = []
    for way, variant in variants(model, task):
        if variant is None:
            rows.append((way, math.nan, math.nan))
            continue
        score = task.measure(variant)
        torch.manual_seed(0)
        # Each way gets the better of two learning rates, lest one of them suit it alone.
        tuned = [
            task.measure(task.train(copy.deepcopy(variant), epochs=1, batch_size=2, lr=lr))
            for lr in FINE_TUNING_RATES
        ]
        rows.append((way, score, max(tuned)))
    return rows


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    torch.set_num_threads(1)
    ways: list[str] = []
    for name in parser.parse_args().networks:
        started = time.perf_counter()
        rows = compare(name)
        if not ways:
            ways = [way for way, _, _ in rows]
            print(f"{'':14}{'':10}" + "".join(f"{way:>12}" for way in ways))
        seconds = f"({time.perf_counter() - started:.0f} s)"
        print(f"{name:14}{'at once':10}" + "".join(f"{score:12.1f}" for _, score, _ in rows))
        print(
            f"{seconds:14}{'tuned':10}" + "".join(f"{tuned:12.1f}" for _, _, tuned in rows),
            flush=True,
        )


if __name__ == "__main__":
    main()
