"""The key encoder of momentum contrast, whose buffers nobody copies: facebookresearch/moco#70.

Its weights follow those of the query encoder, and it runs in train mode without gradients. Its
running statistics are never used. Some implementations call it with gradients, none of which its
weights need, and exchange the weights for new tensors.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch, accuracy
from tests.networks import conv_net, digits


def learn(*, reports: bool = True, is_called_with_gradients: bool = False) -> Run:
    """Train the query encoder next to a key encoder that averages its weights.

    The loop reports its steps and evaluations, or leaves them to be noticed.
    """
    images, labels = digits()
    query = conv_net()
    model = nn.ModuleDict({"query": query, "key": copy.deepcopy(query)})
    model["key"].requires_grad_(False)
    optimizer = torch.optim.SGD(query.parameters(), lr=0.05, momentum=0.9)
    watch = Watch(model, {"optimizer": optimizer})
    for _ in range(3):
        model.train()
        for batch in torch.randperm(1200).split(64):
            for own, new in zip(model["key"].parameters(), query.parameters(), strict=True):
                own.data = own.data.lerp(new.data, 0.05)
            with torch.set_grad_enabled(is_called_with_gradients):
                keys = F.normalize(model["key"](images[batch]), dim=1).detach()
            scores = query(images[batch] + 0.1 * torch.randn(len(batch), 1, 8, 8))
            logits = F.normalize(scores, dim=1) @ keys.T / 0.2
            loss = F.cross_entropy(logits, torch.arange(len(batch)))
            optimizer.zero_grad()
            (loss + F.cross_entropy(scores, labels[batch])).backward()
            optimizer.step()
            if reports:
                watch.monitor.step()
        query.eval()
        with watch.monitor.evaluation() if reports else nullcontext():
            last = accuracy(query, images[1200:], labels[1200:])
    return watch.end(last)


SITUATION = Situation(healthy=learn)
