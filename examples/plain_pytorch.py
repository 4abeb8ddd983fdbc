"""Watch the BN layers in a plain PyTorch loop: three lines, marked with an arrow.

python examples/plain_pytorch.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import bnguard


def block(inputs: int, outputs: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    train, val = random_split(TensorDataset(images, torch.tensor(digits.target)), [1200, 597])
    model = nn.Sequential(block(1, 16), block(16, 32), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    monitor = bnguard.watch(model, optimizer=optimizer)  # <-
    for epoch in range(3):
        model.train()
        for inputs, labels in DataLoader(train, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            monitor.step()  # <-

        model.eval()
        correct = 0
        with torch.no_grad(), monitor.evaluation():  # <-
            for inputs, labels in DataLoader(val, batch_size=256):
                correct += (model(inputs).argmax(1) == labels).sum().item()
        print(f"epoch {epoch}: accuracy {correct / len(val):.1%}")

    print(monitor.report())
    monitor.close()


if __name__ == "__main__":
    main()
