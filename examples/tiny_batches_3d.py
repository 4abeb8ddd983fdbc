"""Learn what to do if memory allows only two samples per batch: compare four ways out of BN.

A 3-D network keeps BN as trained, gets new statistics, is swapped to GroupNorm and distilled, or
uses GroupNorm from the start.

python examples/tiny_batches_3d.py                               some 20 s on a CPU
python examples/tiny_batches_3d.py --volumes 1200 --epochs 6     a real comparison
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard


def digits_in_volumes():
    """Handwritten digits, three voxels thick, at a random depth of an 8x8x8 volume with noise."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    volumes = 0.2 * torch.randn(len(images), 1, 8, 8, 8)
    for volume, image, start in zip(volumes, images, torch.randint(6, (len(images),)), strict=True):
        volume[0, start : start + 3] += image
    return volumes, torch.tensor(digits.target)


def block(inputs, outputs, stride, norm):
    conv = nn.Conv3d(inputs, outputs, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, norm(outputs), nn.ReLU())


def network(norm):
    return nn.Sequential(
        block(1, 16, 2, norm),
        block(16, 32, 1, norm),
        block(32, 64, 2, norm),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def train(model, data, epochs, lr=1e-3, monitor=None):
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(epochs):
        for volumes, labels in DataLoader(data, batch_size=2, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(volumes), labels).backward()
            optimizer.step()
            if monitor is not None:
                monitor.step()


def accuracy(model, volumes, labels):
    model.eval()
    with torch.no_grad():
        return (model(volumes).argmax(1) == labels).float().mean().item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--volumes", type=int, default=240, help="volumes to train on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="distilling steps")
    options = parser.parse_args()
    torch.manual_seed(0)
    volumes, labels = digits_in_volumes()
    data = TensorDataset(volumes[: options.volumes], labels[: options.volumes])
    unseen = (volumes[1200:], labels[1200:])

    model = network(nn.BatchNorm3d)
    monitor = bnguard.watch(model)
    train(model, data, options.epochs, monitor=monitor)
    print(monitor.report())
    monitor.close()
    results = {"BN, as trained at batch size 2": accuracy(model, *unseen)}

    loader = DataLoader(data, batch_size=2, shuffle=True)
    bnguard.recalibrate(model, loader, samples=options.volumes)
    results["BN, recalibrated"] = accuracy(model, *unseen)

    swapped = bnguard.swap(model, "group", teacher_data=loader, steps=options.steps)
    print(swapped)
    results["GroupNorm, swapped and distilled"] = accuracy(swapped.model, *unseen)

    train(swapped.model, data, 1, lr=1e-4)
    results["  and one more epoch at batch size 2"] = accuracy(swapped.model, *unseen)

    scratch = network(lambda channels: nn.GroupNorm(8, channels))
    train(scratch, data, options.epochs + 1)
    results["GroupNorm from scratch, as many epochs"] = accuracy(scratch, *unseen)
    for name, value in results.items():
        print(f"{name:40} {value:.1%}")


if __name__ == "__main__":
    main()
