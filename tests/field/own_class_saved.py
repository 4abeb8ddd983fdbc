"""A BN class as textbooks have it loses its statistics when it is saved: d2l-ai/d2l-zh#1265.

``moving_mean`` and ``moving_var`` are plain attributes, and not in the state dict. The class is
registered, as bnguard proposes when it meets it.
"""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnguard
from tests.field.situation import Run, Situation
from tests.networks import digits


class BatchNorm(nn.Module):
    """Normalise over the batch in training, and with moving averages elsewhere."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        shape = (1, channels, 1, 1)
        self.gamma, self.beta = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.zeros(shape))
        self.moving_mean, self.moving_var = torch.zeros(shape), torch.ones(shape)

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise."""
        mean, var = self.moving_mean, self.moving_var
        if self.training:
            mean = inputs.mean((0, 2, 3), keepdim=True)
            var = ((inputs - mean) ** 2).mean((0, 2, 3), keepdim=True)
            self.moving_mean = 0.9 * self.moving_mean + 0.1 * mean.detach()
            self.moving_var = 0.9 * self.moving_var + 0.1 * var.detach()
        return self.gamma * (inputs - mean) / torch.sqrt(var + 1e-5) + self.beta


bnguard.register_layer(BatchNorm, mean="moving_mean", var="moving_var", momentum=0.1, eps=1e-5)


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        BatchNorm(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        BatchNorm(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def _trained() -> nn.Sequential:
    model, (images, labels) = _network(), digits()
    images = 16.0 * images
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def _saved_and_loaded() -> nn.Sequential:
    file = io.BytesIO()
    torch.save(_trained().state_dict(), file)
    file.seek(0)
    model = _network()
    model.load_state_dict(torch.load(file))
    return model.eval()


def _accuracy(model: nn.Module) -> float:
    images, labels = digits()
    with torch.no_grad():
        scores = model(16.0 * images[1200:])
    return (scores.argmax(1) == labels[1200:]).float().mean().item()


def _run(model: nn.Module) -> Run:
    return Run(_accuracy(model), bnguard.inspect(model).findings)


def _repaired() -> float:
    model, (images, _) = _saved_and_loaded(), digits()
    bnguard.recalibrate(model, (16.0 * images[:1200]).split(64), progress=False)
    return _accuracy(model)


SITUATION = Situation(
    healthy=lambda: _run(_trained()),
    faulty=lambda: _run(_saved_and_loaded()),
    cause="BN304",
    repaired=_repaired,
)
