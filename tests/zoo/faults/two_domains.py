"""One encoder for a digit and its negative; healthy: for two views alike."""

from __future__ import annotations

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import train


def negative(images):
    return 2.0 - 3.0 * images


def run(is_faulty, architecture):
    return train(build("siamese", second_view=negative if is_faulty else None))


FAULT = Fault("BN207", "two domains in one encoder", run, ("siamese",), is_cause=True)
