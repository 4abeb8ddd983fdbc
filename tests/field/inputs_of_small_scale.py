"""BN in front does not scale small inputs up: tensorflow/tensorflow#33027.

Their variance is far below eps, which alone sets the scale. Standardised inputs are fine.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from tests.field.situation import Run, Situation, train
from tests.networks import conv_net, digits


def _train(scale: float) -> Run:
    images, _ = digits()
    images = (images - images.mean()) / images.std() * scale
    return train(nn.Sequential(nn.BatchNorm2d(1), *conv_net()), images=images)


SITUATION = Situation(
    healthy=partial(_train, 1.0),
    faulty=partial(_train, 1e-6),
    cause="BN204",
)
