"""A sampler balances the classes in training: ufoym/imbalanced-dataset-sampler#38.

Half of a training batch are of the rare class, and 3 % of validation. The statistics of training
are the right ones for a validation sample too; those of a validation batch are not.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits

_TRAINING = 1200
_RARE = 16


def _healthy() -> Run:
    images, labels = digits()
    is_eight = (labels == 8).long()
    weights = torch.where(is_eight[:_TRAINING] == 1, 9.0, 1.0).tolist()
    loader = DataLoader(
        TensorDataset(images[:_TRAINING], is_eight[:_TRAINING]),
        batch_size=32,
        sampler=WeightedRandomSampler(weights, _TRAINING),
    )
    held = torch.arange(_TRAINING, len(images))
    of_class = [held[is_eight[held] == number] for number in (0, 1)]
    held = torch.cat([of_class[0], of_class[1][:_RARE]])
    held = held[torch.randperm(len(held))]
    model = conv_net()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(6):
        model.train()
        for batch, expected in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), expected).backward()
            optimizer.step()
        last = evaluate(watch, images[held], is_eight[held])
    return watch.end(last)


SITUATION = Situation(healthy=_healthy)
