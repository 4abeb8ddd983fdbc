"""A meta-learner with momentum 1 that tests in train mode: tristandeleu/pytorch-maml#5.

The batch of an episode is to normalise, in the test too, as in learnables/learn2learn#207; the
running statistics are not used. In ordinary training, they are those of the last nine samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from tests.field.situation import Run, Situation, Watch, shuffled, train
from tests.networks import conv_net, digits, mlp

_Weights = dict[str, Tensor]


def _episode(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return 5 images each of 5 classes to adapt to, and 10 each to test with."""
    parts = []
    for cls in torch.randperm(10)[:5]:
        own = (labels == cls).nonzero()[:, 0]
        parts.append(images[own[torch.randperm(len(own))][:15]])
    known, asked = (
        torch.cat(list(half)) for half in zip(*(part.split((5, 10)) for part in parts), strict=True)
    )
    classes = torch.arange(5)
    return known, classes.repeat_interleave(5), asked, classes.repeat_interleave(10)


def _adapted(model: nn.Module, images: Tensor, labels: Tensor) -> _Weights:
    """Return the weights after a step of the inner loop."""
    weights = dict(model.named_parameters())
    loss = F.cross_entropy(functional_call(model, weights, images), labels)
    gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
    return {name: w - 0.4 * g for (name, w), g in zip(weights.items(), gradients, strict=True)}


def _learn() -> Run:
    model, (images, labels) = conv_net(momentum=1.0), digits()
    model[-1] = nn.Linear(128, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    watch = Watch(model, {"optimizer": optimizer})
    shares = []
    for step in range(60):
        optimizer.zero_grad()
        for _ in range(2):
            known, classes, asked, answers = _episode(images[:1200], labels[:1200])
            scores = functional_call(model, _adapted(model, known, classes), asked)
            F.cross_entropy(scores, answers).backward()
        optimizer.step()
        watch.monitor.step()
        if step % 20 == 19:
            shares = []
            for _ in range(10):
                known, classes, asked, answers = _episode(images[1200:], labels[1200:])
                weights = _adapted(model, known, classes)
                with torch.no_grad():
                    scores = functional_call(model, weights, asked)
                shares.append((scores.argmax(1) == answers).float().mean().item())
    return watch.end(sum(shares) / len(shares))


def _train(momentum: float) -> Run:
    model = mlp(32)
    model[1].momentum = model[4].momentum = momentum
    return train(model, images=digits()[0].flatten(1), batches=shuffled(9))


SITUATION = Situation(
    healthy=_learn,
    faulty=lambda: _train(1.0),
    cause="BN103",
    repaired=lambda: _train(0.1).accuracy,
)
