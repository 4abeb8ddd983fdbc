"""A backbone frozen by requires_grad alone; healthy: in eval mode as well."""

from __future__ import annotations

from tests.zoo.fault import Fault
from tests.zoo.training import head, norms, pretrained, train


def run(is_faulty, architecture):
    model = pretrained(architecture)
    model.requires_grad_(False)
    head(model).requires_grad_(True)

    def start_epoch(model, epoch):
        model.train()
        if not is_faulty:
            for layer in norms(model):
                layer.eval()

    return train(model, start_epoch=start_epoch, epochs=2)


FAULT = Fault("BN101", "frozen by requires_grad alone", run, ("conv", "resnet", "mlp"))
