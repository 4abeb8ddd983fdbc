"""Small networks of every kind that BN stands in; each takes digits, shape (N, 1, 8, 8)."""

from __future__ import annotations

import torch
from torch import nn


def _conv(inputs, outputs, stride=1, groups=1, momentum=0.1):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, groups=groups, bias=False),
        nn.BatchNorm2d(outputs, momentum=momentum),
    )


def mlp(momentum=0.1):
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 32, bias=False),
        nn.BatchNorm1d(32, momentum=momentum),
        nn.ReLU(),
        nn.Linear(32, 32, bias=False),
        nn.BatchNorm1d(32, momentum=momentum),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def conv_net(momentum=0.1):
    return nn.Sequential(
        _conv(1, 8, momentum=momentum),
        nn.ReLU(),
        _conv(8, 16, stride=2, momentum=momentum),
        nn.ReLU(),
        _conv(16, 32, stride=2, momentum=momentum),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride, momentum):
        super().__init__()
        self.first = _conv(inputs, outputs, stride, momentum=momentum)
        self.second = _conv(outputs, outputs, momentum=momentum)
        self.shortcut = nn.Identity() if stride == 1 else _conv(inputs, outputs, 2)
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(self.second(self.relu(self.first(x))) + self.shortcut(x))


def resnet(momentum=0.1):
    return nn.Sequential(
        _conv(1, 8, momentum=momentum),
        nn.ReLU(),
        Block(8, 8, 1, momentum),
        Block(8, 16, 2, momentum),
        Block(16, 32, 2, momentum),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def depthwise(momentum=0.1):
    layers = [_conv(1, 8, momentum=momentum), nn.ReLU6()]
    for inputs, outputs, stride in ((8, 16, 2), (16, 32, 2)):
        layers += [_conv(inputs, inputs, stride, groups=inputs, momentum=momentum), nn.ReLU6()]
        layers += [
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs, momentum=momentum),
            nn.ReLU6(),
        ]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 10))


class UNet(nn.Module):
    """Gives two scores a pixel: ink or paper."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.down = _conv(1, 8, momentum=momentum)
        self.bottom = _conv(8, 16, stride=2, momentum=momentum)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.joint = _conv(16, 8, momentum=momentum)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        high = self.down(x).relu()
        low = self.bottom(high).relu()
        return self.head(self.joint(torch.cat([high, self.up(low)], 1)).relu())


class Volumes(nn.Module):
    """A 3-D network: the digit, fading through four slices."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, 6, 3, padding=1, bias=False),
            nn.BatchNorm3d(6, momentum=momentum),
            nn.ReLU(),
            nn.Conv3d(6, 12, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm3d(12, momentum=momentum),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(12 * 2 * 4 * 4, 10),
        )

    def forward(self, x):
        fading = torch.linspace(1.0, 0.25, 4).view(1, 1, 4, 1, 1)
        return self.layers(x.unsqueeze(2) * fading)


class Sequence(nn.Module):
    """BatchNorm1d on (N, C, L): the rows of a digit are the channels of a sequence."""

    def __init__(self, momentum=0.1):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(8, 16, 3, padding=1, bias=False),
            nn.BatchNorm1d(16, momentum=momentum),
            nn.ReLU(),
            nn.Conv1d(16, 32, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm1d(32, momentum=momentum),
            nn.ReLU(),
            nn.Flatten(),
            nn.LazyLinear(10),
        )

    def forward(self, x):
        return self.layers(x.squeeze(1))


class Siamese(nn.Module):
    """One encoder for two views of a digit, which are called one after the other."""

    def __init__(self, momentum=0.1, second_view=None):
        super().__init__()
        self.encoder = conv_net(momentum)
        self.second_view = second_view or torch.Tensor.contiguous

    def forward(self, x):
        return (self.encoder(x) + self.encoder(self.second_view(x))) / 2


ARCHITECTURES = {
    "mlp": mlp,
    "conv": conv_net,
    "resnet": resnet,
    "depthwise": depthwise,
    "unet": UNet,
    "volumes": Volumes,
    "sequence": Sequence,
    "siamese": Siamese,
}


def build(architecture, **options):
    model = ARCHITECTURES[architecture](**options)
    model(torch.zeros(2, 1, 8, 8))  # lazy layers take their shape
    for module in model.modules():
        if hasattr(module, "reset_running_stats"):
            module.reset_running_stats()
    return model
