"""An actor that plays in train mode between the steps of its learner: google-research/seed_rl#28.

The batch of a few environments, which all show the start of an episode, is unlike the batches of
the replay memory, and updates the running statistics that the policy is evaluated with.
DLR-RM/stable-baselines3#553 puts the networks in eval mode for it.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from tests.field.situation import Run, Situation, Watch, evaluate
from tests.networks import conv_net, digits


def _train(*, plays_in_eval_mode: bool) -> Run:
    images, labels = digits()
    start = 0.1 * images
    policy = conv_net()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-3)
    watch = Watch(policy, {"optimizer": optimizer})
    for step in range(200):
        policy.train(not plays_in_eval_mode)
        with torch.no_grad():
            for part in torch.randint(1200, (4, 4)):
                policy(start[part]).argmax(1)
        policy.train()
        batch = torch.randint(1200, (64,))
        optimizer.zero_grad()
        F.cross_entropy(policy(images[batch]), labels[batch]).backward()
        optimizer.step()
        watch.monitor.step()
        if step % 50 == 49:
            accuracy = evaluate(watch, images[1200:], labels[1200:])
    return watch.end(accuracy)


SITUATION = Situation(
    healthy=partial(_train, plays_in_eval_mode=True),
    faulty=partial(_train, plays_in_eval_mode=False),
    cause="BN206",
)
