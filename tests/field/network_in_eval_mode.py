"""A pretrained network that is fine-tuned in eval mode, image by image: backseason/PoolNet#30.

There is no reason to estimate statistics from one image; those of the pretraining serve both modes.
"""

from __future__ import annotations

from tests.field.situation import Run, Situation, shuffled, train
from tests.networks import conv_net


def _healthy() -> Run:
    model = conv_net()
    train(model, epochs=3)
    return train(model, batches=shuffled(1, 300), lr=2e-4, epochs=2, start=model.eval)


SITUATION = Situation(
    healthy=_healthy,
)
