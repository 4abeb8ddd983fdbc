"""Frozen once, unfrozen by the next model.train()."""

from __future__ import annotations

from tests.zoo.fault import Fault
from tests.zoo.training import norms, pretrained, train


def run(is_faulty, architecture):
    def start_epoch(model, epoch):
        model.train()
        if epoch == 0 or not is_faulty:
            for layer in norms(model):
                layer.eval()

    return train(pretrained(architecture), start_epoch=start_epoch, epochs=6)


FAULT = Fault("BN208", "unfrozen by model.train()", run, ("conv", "resnet", "sequence"))
