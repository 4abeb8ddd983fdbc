"""Utterances of one length in a batch, and the batches shuffled: PaddlePaddle/PaddleSpeech#2654.

The advice against padding (SeanNaren/deepspeech.pytorch#312) groups the data by length, and by
nothing that BN normalises.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch
from tests.networks import digits


def _layers(inputs: int) -> list[nn.Module]:
    convolution = nn.Conv1d(inputs, 32, 3, padding=1, padding_mode="replicate")
    return [convolution, nn.BatchNorm1d(32), nn.ReLU()]


def _healthy() -> Run:
    images, labels = digits()
    frames = 2.0 * images.squeeze(1) - 1.0
    times = torch.tensor([1, 2, 12])[torch.randint(3, (1797,))]
    pool = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 10))
    model = nn.Sequential(*_layers(8), *_layers(32), *pool)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(6):
        model.train()
        order = torch.randperm(1200)
        batches = [
            (time, batch) for time in (1, 2, 12) for batch in order[times[order] == time].split(32)
        ]
        for i in torch.randperm(len(batches)).tolist():
            time, batch = batches[i]
            optimizer.zero_grad()
            F.cross_entropy(model(frames[batch].repeat(1, 1, time)), labels[batch]).backward()
            optimizer.step()
            watch.monitor.step()
        model.eval()
        with torch.no_grad(), watch.monitor.evaluation():
            scores = [model(frames[[i]].repeat(1, 1, int(times[i]))) for i in range(1200, 1797)]
    return watch.end((torch.cat(scores).argmax(1) == labels[1200:]).float().mean().item())


SITUATION = Situation(healthy=_healthy)
