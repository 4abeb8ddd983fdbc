"""A copy made from the parameters alone."""

from __future__ import annotations

import torch

import bnguard
from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import Watched, pretrained


def run(is_faulty, architecture):
    trained, copied = pretrained(architecture), build(architecture)
    with torch.no_grad():
        for target, source in zip(copied.parameters(), trained.parameters(), strict=True):
            target.copy_(source)
    subject = copied if is_faulty else trained
    return Watched(bnguard.inspect(subject.state_dict()), 0)


FAULT = Fault("BN304", "buffers lost in a copy", run, ("conv", "sequence"), is_cause=True)
