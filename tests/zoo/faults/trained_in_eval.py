"""No train() before training, or after a validation."""

from __future__ import annotations

from tests.zoo.architectures import build
from tests.zoo.fault import Fault
from tests.zoo.training import pretrained, train


def run(is_faulty, architecture):
    model = pretrained(architecture)
    return train(model, start_epoch=lambda model, epoch: model.train(not is_faulty), epochs=2)


def run_forgotten(is_faulty, architecture):
    def start_epoch(model, epoch):
        if epoch == 0 or not is_faulty:
            model.train()

    return train(pretrained(architecture), start_epoch=start_epoch, epochs=2)


def run_from_scratch(is_faulty, architecture):
    model = build(architecture)
    return train(model, start_epoch=lambda model, epoch: model.train(not is_faulty), epochs=2)


# Before an evaluation it may be a choice. It costs an MLP 4 to 16 points, a convolutional network
# 1 to 3 (4 seeds), since its inputs stay near the fixed statistics.
FAULT = Fault("BN209", "fine-tuned in eval mode", run, ("mlp",), shows_early=False)
FORGOTTEN = Fault(
    "BN209", "train() forgotten after validation", run_forgotten, ("conv",), shows_early=False
)
FROM_SCRATCH = Fault("BN209", "trained from scratch in eval mode", run_from_scratch, ("resnet",))
