"""Tracking switched off on a frozen backbone, as Lightning once did; healthy: eval mode."""

from __future__ import annotations

from tests.zoo.fault import Fault
from tests.zoo.training import head, norms, pretrained, train


def run(is_faulty, architecture):
    model = pretrained(architecture)
    model.requires_grad_(False)
    head(model).requires_grad_(True)

    def start_epoch(model, epoch):
        model.train()
        for layer in norms(model):
            if is_faulty:
                layer.track_running_stats = False
            else:
                layer.eval()

    return train(model, start_epoch=start_epoch, epochs=2)


FAULT = Fault("BN104", "tracking switched off", run, ("conv", "sequence"))
