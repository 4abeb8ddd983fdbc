"""The global model of federated averaging, buffers averaged as well: SymbioticLab/FedScale#57.

In the first round its weights and its statistics are both those of clients that have hardly begun.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits


def _healthy() -> Run:
    model, (images, labels) = conv_net(), digits()
    watch = Watch(model)
    for _ in range(6):
        states = []
        for client in range(3):
            copied = copy.deepcopy(model).train()
            optimizer = torch.optim.SGD(copied.parameters(), lr=0.05, momentum=0.9)
            for batch in (torch.randperm(400) + 400 * client).split(40):
                optimizer.zero_grad()
                F.cross_entropy(copied(images[batch]), labels[batch]).backward()
                optimizer.step()
            states.append(copied.state_dict())
        model.load_state_dict(
            {
                name: torch.stack([state[name].float() for state in states]).mean(0).to(value.dtype)
                for name, value in states[0].items()
            }
        )
        watch.monitor.step()
        accuracy = evaluate(watch, images[1200:], labels[1200:])
    return watch.end(accuracy)


SITUATION = Situation(healthy=_healthy)
