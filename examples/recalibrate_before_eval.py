"""Learn to recalibrate before evaluation, with a score that decides whether it is kept.

The network trains on batches of two, so its running statistics are mostly noise.

python examples/recalibrate_before_eval.py
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
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)

    for inputs, labels in DataLoader(train, batch_size=2, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    def accuracy(model: nn.Module) -> float:
        batches = DataLoader(val, batch_size=256)
        correct = sum((model(x).argmax(1) == y).sum().item() for x, y in batches)
        return correct / len(val)

    # On training data: the validation images only score.
    result = bnguard.recalibrate(model, DataLoader(train, batch_size=32), score=accuracy)
    print(result)
    before, after = result.score_before, result.score_after
    print(f"bnguard · accuracy in eval mode {before:.1%} → {after:.1%}")


if __name__ == "__main__":
    main()
