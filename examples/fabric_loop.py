"""Learn to watch a loop with Lightning Fabric: one line, and the report of all ranks at the end.

python examples/fabric_loop.py
"""

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, random_split

import bnguard
from bnguard.demo import DigitsData, DigitsNet


def main() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0)
    data = DigitsData()
    data.setup("fit")
    source = DigitsNet(width=8, momentum=0.1)
    net = nn.Sequential(source.features, nn.Flatten(), source.classifier)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.05))
    train, check = random_split(data.train, [1000, 200])
    loaders = fabric.setup_dataloaders(DataLoader(train, 16, shuffle=True), DataLoader(check, 100))

    monitor = bnguard.watch(model, optimizer=optimizer)  # the line
    for epoch in range(2):
        model.train()
        for images, labels in loaders[0]:
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(images), labels))
            optimizer.step()

        model.eval()
        correct = 0
        with torch.no_grad():
            for images, labels in loaders[1]:
                correct += (model(images).argmax(1) == labels).sum().item()
        fabric.print(f"epoch {epoch}: accuracy {correct / len(check):.1%}")

    report = monitor.report_of_all_ranks()  # call it on each rank
    if fabric.is_global_zero:
        print(report)
    monitor.close()


if __name__ == "__main__":
    main()
