"""Utterances are padded with zeros in training, not one by one: SeanNaren/deepspeech.pytorch#312.

The running statistics are those of speech and silence together.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, train
from tests.networks import digits


class _Listener(nn.Module):
    """Two convolutions in time, and the largest value over it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(8, 16, 3, padding=1, bias=False), nn.BatchNorm1d(16)
        self.second, self.other = nn.Conv1d(16, 32, 3, padding=1, bias=False), nn.BatchNorm1d(32)
        self.last = nn.Linear(32, 10)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        frames = self.norm(self.first(frames)).relu()
        return self.last(self.other(self.second(frames)).relu().amax(2))


def _train(*, is_padded: bool) -> Run:
    images, labels = digits()
    frames, model = images.squeeze(1) + 0.5, _Listener()

    def loss(batch: torch.Tensor) -> torch.Tensor:
        spoken = F.pad(frames[batch], (0, 24)) if is_padded else frames[batch]
        return F.cross_entropy(model(spoken), labels[batch])

    return train(model, loss=loss, images=frames)


SITUATION = Situation(
    healthy=partial(_train, is_padded=False),
    faulty=partial(_train, is_padded=True),
    cause="BN305",
)
