"""Training data sorted by class, some 30 batches of each, as in jiecaoyu/XNOR-Net-PyTorch#38.

``shuffle=False`` on data that lie in folders of classes; happynear/NormFace#4 has another. The loop
draws batches itself, so that no loader says it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.field.situation import Run, Situation, Watch
from tests.networks import conv_net, digits


def _train(*, shuffles: bool, has_loader: bool = False) -> Run:
    images, labels = digits()
    order = labels[:1200].argsort(stable=True)
    loader = DataLoader(TensorDataset(images[order], labels[order]), 4, shuffle=shuffles)
    model = conv_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    options = {"optimizer": optimizer, "loader": loader if has_loader else None}
    watch = Watch(model, options)
    for _ in range(2):
        model.train()
        for inputs, targets in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            watch.monitor.step()
        model.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            scores = torch.cat([model(part) for part in images[1200:].split(64)])
    return watch.end((scores.argmax(1) == labels[1200:]).float().mean().item())


def situation(*, has_loader: bool) -> Situation:
    """Return the situation with or without a loader that the monitor is given."""
    train = partial(_train, has_loader=has_loader)
    return Situation(
        healthy=partial(train, shuffles=True),
        faulty=partial(train, shuffles=False),
        cause="BN203",
    )


SITUATION = situation(has_loader=False)
