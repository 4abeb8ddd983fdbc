"""The networks that the benchmarks run on, as their papers define them, with random weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def resnet18() -> nn.Module:
    """ResNet-18 (He et al. 2016): 20 BN layers."""
    return _ResNet(_BasicBlock, (2, 2, 2, 2))


def resnet50() -> nn.Module:
    """ResNet-50 (He et al. 2016), the stride in the 3×3 convolution: 53 BN layers."""
    return _ResNet(_Bottleneck, (3, 4, 6, 3))


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 (Sandler et al. 2018): 52 BN layers."""
    settings = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    width = 32
    parts: list[nn.Module] = [_normalised(3, width, 3, stride=2), nn.ReLU6(inplace=True)]
    for expansion, out, repeats, stride in settings:
        for index in range(repeats):
            parts.append(_InvertedResidual(width, out, stride if index == 0 else 1, expansion))
            width = out
    parts += [_normalised(width, 1280, 1), nn.ReLU6(inplace=True)]
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, 1000)]
    return nn.Sequential(*parts)


def volumetric() -> nn.Module:
    """The blocks of a small 3-D U-Net (Çiçek et al. 2016), without its skips: 8 BN layers."""
    widths = (1, 16, 16, 32, 32, 64, 32, 32, 16)
    strides = (1, 1, 2, 1, 2, 1, 1, 1)
    layers: list[nn.Module] = []
    for channels, out, stride in zip(widths[:-1], widths[1:], strides, strict=True):
        layers += [
            nn.Conv3d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm3d(out),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.Conv3d(widths[-1], 2, 1))


def perceptron() -> nn.Module:
    """An MLP with 3 BN layers, whose training step takes about 2 ms on two CPU cores."""
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(320, 320), nn.BatchNorm1d(320), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(320, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "MobileNetV2": mobilenet_v2,
}


def _normalised(
    channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    )


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = _normalised(channels, width, 3, stride=stride)
        self.second = _normalised(width, width, 3)
        self.shortcut = _shortcut(channels, width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))) + self.shortcut(x))


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = _normalised(channels, width, 1)
        self.second = _normalised(width, width, 3, stride=stride)
        self.third = _normalised(width, 4 * width, 1)
        self.shortcut = _shortcut(channels, 4 * width, stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.second(self.relu(self.first(x))))
        return self.relu(self.third(out) + self.shortcut(x))


class _ResNet(nn.Module):
    def __init__(
        self, block: type[_BasicBlock] | type[_Bottleneck], depths: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            _stem(), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)
        )
        channels, blocks = 64, []
        for index, depth in enumerate(depths):
            width = 64 * 2**index
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                blocks.append(block(channels, width, stride))
                channels = width * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.blocks(self.stem(x)).mean((2, 3)), 1))


def _stem() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(64))


def _shortcut(channels: int, out: int, stride: int) -> nn.Module:
    if stride == 1 and channels == out:
        return nn.Identity()
    return _normalised(channels, out, 1, stride=stride)


class _InvertedResidual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [_normalised(channels, hidden, 1), nn.ReLU6(inplace=True)]
        layers += [
            _normalised(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.ReLU6(inplace=True),
            _normalised(hidden, out, 1),
        ]
        self.layers = nn.Sequential(*layers)
        self.has_residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        out = self.layers(x)
        return x + out if self.has_residual else out
