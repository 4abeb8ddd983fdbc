"""A batch holds crops of one image; healthy: of as many images."""

from __future__ import annotations

import torch
from torch import nn

import bnguard
from tests.networks import digits
from tests.zoo.fault import Fault
from tests.zoo.training import Watched, never


def run(is_faulty, architecture):
    images, _ = digits()
    # Bright and dark scans, whose brightness is the signal.
    scans = images + 3.0 * torch.randn(len(images), 1, 1, 1)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    with bnguard.watch(model, every_n_steps=10, on_findings=never) as monitor:
        for _ in range(100):
            chosen = torch.randint(len(scans), (1 if is_faulty else 16,)).expand(16)
            noisy = scans[chosen] + 0.02 * torch.randn(16, 1, 8, 8)
            model(noisy)
            monitor.step()
    return Watched(monitor.report(), 100)


FAULT = Fault("BN201", "crops of one image a batch", run)
