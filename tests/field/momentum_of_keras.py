"""A momentum copied from another framework: kazuto1011/deeplab-pytorch#79.

0.999 was meant as the share of the old value, as TensorFlow has it; PyTorch takes it as the share
of the new one, so that the statistics are those of the last batch. pytorch/vision#8250 and
r9y9/tacotron_pytorch#19 are the same mistake.
"""

from __future__ import annotations

from tests.field.situation import Run, Situation, shuffled, train
from tests.networks import digits, mlp


def _train(momentum: float) -> Run:
    model = mlp(32)
    model[1].momentum = model[4].momentum = momentum
    return train(model, images=digits()[0].flatten(1), batches=shuffled(9))


SITUATION = Situation(
    healthy=lambda: _train(0.1),
    faulty=lambda: _train(0.999),
    cause="BN103",
)
