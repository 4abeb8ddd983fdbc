"""No train() before training."""

from __future__ import annotations

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import pretrained, train


def run(is_faulty, architecture):
    model = pretrained(architecture)
    return train(model, start_epoch=lambda model, epoch: model.train(not is_faulty), epochs=2)


def run_from_scratch(is_faulty, architecture):
    model = build(architecture)
    return train(model, start_epoch=lambda model, epoch: model.train(not is_faulty), epochs=2)


FAULT = Fault("BN209", "fine-tuned in eval mode", run, ("conv", "mlp"))
FROM_SCRATCH = Fault("BN209", "trained from scratch in eval mode", run_from_scratch, ("resnet",))
