"""A discriminator called on real and generated digits apart, a generator that forgets nothing."""

from __future__ import annotations

from tests.zoo.fault import Fault
from tests.zoo.gan import train_gan


def apart(is_faulty, architecture):
    return train_gan("discriminator", is_concatenated=not is_faulty)


def unconverged(is_faulty, architecture):
    return train_gan("generator", momentum=0.001 if is_faulty else 0.1)


# Harm shows when the discriminator is used in eval mode, which is at the end alone.
APART = Fault(
    "BN207", "real and generated apart", apart, ("gan",), shows_early=False, is_cause=True
)
UNCONVERGED = Fault("BN303", "a generator's momentum 0.001", unconverged, ("gan",), is_cause=True)
