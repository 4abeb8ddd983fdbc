"""The target network of DQN, whose buffers Polyak updates leave out: DLR-RM/stable-baselines3#996.

A contextual bandit on digits: the action is a digit, the reward 1 if it is the right one, and the
value of the next state comes from the target network, in eval mode. Only training calls it.
"""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from tests.field.situation import Run, Situation, Watch
from tests.field.teacher_without_buffers import pretrained
from tests.networks import digits


def _train(*, copies_buffers: bool) -> Run:
    images, labels = digits()
    policy = pretrained()
    target = copy.deepcopy(policy).eval()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    watch = Watch(nn.ModuleDict({"policy": policy, "target": target}), {"optimizer": optimizer})
    for _ in range(150):
        policy.train()
        batch, after = torch.randint(1200, (2, 64))
        actions = torch.where(torch.rand(64) < 0.5, labels[batch], torch.randint(10, (64,)))
        reward = (actions == labels[batch]).float()
        future = target(images[after]).max(1).values.detach()
        values = policy(images[batch]).gather(1, actions[:, None]).squeeze(1)
        optimizer.zero_grad()
        F.smooth_l1_loss(values, reward + 0.2 * future).backward()
        optimizer.step()
        with torch.no_grad():
            for own, new in zip(target.parameters(), policy.parameters(), strict=True):
                own.lerp_(new, 0.05)
            if copies_buffers:
                for own, new in zip(target.buffers(), policy.buffers(), strict=True):
                    own.copy_(new)
        watch.monitor.step()
    policy.eval()
    with torch.no_grad(), watch.monitor.evaluation():
        policy(images[1200:])
    with torch.no_grad():
        chosen = target(images[1200:]).argmax(1)
    return watch.end((chosen == labels[1200:]).float().mean().item())


SITUATION = Situation(
    healthy=partial(_train, copies_buffers=True),
    faulty=partial(_train, copies_buffers=False),
    cause="BN304",
)
