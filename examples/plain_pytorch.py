"""Learn to watch a plain PyTorch loop with one line, and what a report says.

The fault is a common one: validation forgets to normalise the images as training did. Nothing
raises an error, the accuracy is poor, and the report names the reason.

python examples/plain_pytorch.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard


def block(inputs: int, outputs: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


@torch.no_grad()
def accuracy(model: nn.Module, data: TensorDataset) -> float:
    model.eval()
    correct = 0
    for inputs, targets in DataLoader(data, batch_size=256):
        correct += (model(inputs).argmax(1) == targets).sum().item()
    return correct / len(data)


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, val = order[:1200], order[1200:]
    normalised = (images - images.mean()) / images.std()
    train_set = TensorDataset(normalised[train], labels[train])
    val_set = TensorDataset(images[val], labels[val])  # the fault: not normalised
    model = nn.Sequential(block(1, 16), block(16, 32), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    monitor = bnguard.watch(model, optimizer=optimizer)  # the line
    for epoch in range(2):
        model.train()
        for inputs, targets in DataLoader(train_set, batch_size=32, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

        print(f"epoch {epoch}: accuracy {accuracy(model, val_set):.1%}")

    print(monitor.report())
    monitor.close()
    fixed = TensorDataset(normalised[val], labels[val])
    print(f"bnguard · normalised as in training: accuracy {accuracy(model, fixed):.1%}")


if __name__ == "__main__":
    main()
