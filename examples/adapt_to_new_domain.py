"""Learn to adapt a trained network to a new domain, from a few samples without labels.

The digits of the new domain are darker and have less contrast. Their statistics replace those of
training. With a prior these keep some weight, which helps if there are only two samples.

python examples/adapt_to_new_domain.py
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnguard


def block(inputs: int, outputs: int) -> nn.Module:
    conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def new_domain(images: Tensor) -> Tensor:
    return 0.7 * images - 0.15 + 0.1 * torch.randn(images.shape)


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, few, test = order[:1200], order[1200:1232], order[1232:]

    model = nn.Sequential(block(1, 16), block(16, 32), nn.Flatten(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        batches = TensorDataset(images[train], labels[train])
        for inputs, targets in DataLoader(batches, batch_size=64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()

    target = new_domain(images[test])

    def accuracy(model: nn.Module) -> float:
        return (model(target).argmax(1) == labels[test]).float().mean().item()

    unlabelled = new_domain(images[few])
    for count, prior in ((32, 0), (2, 0), (2, 4)):
        result = bnguard.recalibrate(
            model, [unlabelled[:count]], method="adapt", prior=prior, score=accuracy
        )
        before, after = result.score_before, result.score_after
        print(f"bnguard · {count} samples, prior {prior}: accuracy {before:.1%} → {after:.1%}")
        result.undo()


if __name__ == "__main__":
    main()
