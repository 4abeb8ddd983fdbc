"""The critic of a DCGAN, fed real and generated images in turn: eriklindernoren/Keras-GAN#9.

Its running statistics fit neither, and nobody uses them: it is never called in eval mode.
"""

from __future__ import annotations

from tests.field.gan_small_batches import play
from tests.field.situation import Run, Situation


def _healthy() -> Run:
    return play(batch=64, steps=150)


SITUATION = Situation(healthy=_healthy)
