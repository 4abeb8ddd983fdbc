"""A global model with averaged parameters, and the buffers of one client: TsingZ0/PFLlib#269.

Each client photographs with another exposure. vaseline555/Federated-Learning-in-PyTorch#14 sends
gamma and beta alone in the same way.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F

import bnguard
from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits

_EXPOSURES = ((1.0, 0.0), (0.7, 0.4), (0.4, 0.8), (0.25, 1.2))


def _learn(*, shares_buffers: bool) -> Run:
    model, (images, labels) = conv_net(), digits()
    client_of = torch.randint(4, (len(images),))
    gain, level = torch.tensor(_EXPOSURES)[client_of].T[..., None, None, None]
    images = gain * images + level
    parts = [(client_of[:1200] == client).nonzero()[:, 0] for client in range(4)]
    watch = Watch(model)
    for _ in range(8):
        states = []
        for part in parts:
            copied = copy.deepcopy(model).train()
            optimizer = torch.optim.SGD(copied.parameters(), lr=0.03, momentum=0.9)
            for batch in part[torch.randint(len(part), (12, 50))]:
                optimizer.zero_grad()
                F.cross_entropy(copied(images[batch]), labels[batch]).backward()
                optimizer.step()
            states.append(copied.state_dict())
        for name, _ in model.named_parameters():
            states[0][name] = torch.stack([state[name] for state in states]).mean(0)
        model.load_state_dict(states[0])
        if shares_buffers:
            bnguard.recalibrate(model, images[:1200].split(100), keep="always")
        watch.monitor.step()
        accuracy = evaluate(watch, images[1200:], labels[1200:])
    return watch.end(accuracy)


SITUATION = Situation(
    healthy=partial(_learn, shares_buffers=True),
    faulty=partial(_learn, shares_buffers=False),
    cause="BN304",
)
