"""Faults of a Trainer's own: its callbacks, its loaders, its settings."""

from __future__ import annotations

import copy

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from tests.zoo.fault import Fault
from tests.zoo.trainer import Classifier, fit, trained, training_data
from tests.zoo.training import norms


class HeadFirst(Classifier):
    """Begins with the head; BackboneFinetuning adds the backbone later, or never."""

    def __init__(self, architecture, is_held):
        super().__init__(architecture)
        self.is_held = is_held

    def on_train_epoch_start(self):
        if self.is_held:
            for layer in norms(self.backbone):
                layer.eval()

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.05)


def backbone_finetuning(is_faulty, architecture):
    """Freezing without ``train_bn`` takes gamma and beta along; the mode stays."""
    callback = BackboneFinetuning(100, lambda epoch: 1.0, 0.1)
    module = trained(HeadFirst(architecture, not is_faulty), architecture)
    return fit(module, callback, max_epochs=2)


class AveragedOverEpochs(lightning.Callback):
    """Evaluates the average of the weights over epochs, whose statistics nobody took.

    In the healthy run they are estimated for them.
    """

    def __init__(self, is_updated):
        self.is_updated = is_updated
        self.past, self.own = [], {}

    @torch.no_grad()
    def on_validation_epoch_start(self, trainer, module):
        if trainer.sanity_checking:
            return
        self.own = copy.deepcopy(module.state_dict())
        self.past.append([parameter.clone() for parameter in module.parameters()])
        for parameter, *values in zip(module.parameters(), *self.past, strict=True):
            parameter.copy_(torch.stack(values).mean(0))
        if self.is_updated:
            update_bn(training_data().tensors[0].split(64), module)
            module.eval()

    def on_validation_epoch_end(self, trainer, module):
        if not trainer.sanity_checking:
            module.load_state_dict(self.own)


class Fast(Classifier):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


def averaged(is_faulty, architecture):
    return fit(Fast(architecture), AveragedOverEpochs(not is_faulty), max_epochs=4)


def last_batch(is_faulty, architecture):
    # Ended before the batch that would raise: it has to be told ahead.
    loader = DataLoader(training_data(1153), batch_size=32, shuffle=True, drop_last=not is_faulty)
    return fit(Classifier(architecture), loader=loader, max_steps=32)


def accumulated(is_faulty, architecture):
    return fit(
        Classifier(architecture),
        batch_size=4 if is_faulty else 32,
        accumulate_grad_batches=4,
        limit_train_batches=100,
        max_epochs=1 if is_faulty else 4,
    )


def short_run(is_faulty, architecture):
    return fit(Classifier(architecture, momentum=0.001 if is_faulty else 0.1), max_epochs=2)


class Thawed(Classifier):
    """Freezes its backbone once, and calls train() in every epoch."""

    def __init__(self, architecture, is_faulty):
        super().__init__(architecture)
        self.is_faulty = is_faulty

    def on_train_epoch_start(self):
        self.train()
        if self.current_epoch == 0 or not self.is_faulty:
            for layer in norms(self.backbone):
                layer.eval()


def thawed(is_faulty, architecture):
    return fit(trained(Thawed(architecture, is_faulty), architecture), max_epochs=6)


def unshuffled(is_faulty, architecture):
    """A loader without shuffle over a folder a class."""
    data = training_data()
    by_class = torch.utils.data.Subset(data, torch.argsort(data.tensors[1], stable=True).tolist())
    loader = DataLoader(by_class, batch_size=32, shuffle=not is_faulty, drop_last=True)
    return fit(Classifier(architecture), loader=loader)


def other_transform(is_faulty, architecture):
    def normalised(images):
        return (images - 0.3) / 0.37

    def raw(images):
        return 255.0 * images

    return fit(
        Classifier(architecture),
        change=normalised,
        change_evaluation=raw if is_faulty else normalised,
        max_epochs=3,
    )


def bad_sample(is_faulty, architecture):
    def spoilt(images):
        images = images.clone()
        if is_faulty:
            images[7] = torch.nan
        return images

    return fit(Classifier(architecture), change=spoilt, max_epochs=6, detect_anomaly=False)


FINETUNING = Fault("BN101", "a Trainer's BackboneFinetuning", backbone_finetuning, ("conv", "mlp"))
LAST_BATCH = Fault("BN102", "a Trainer's last batch of one", last_batch, ("mlp",))
ACCUMULATED = Fault("BN107", "a Trainer's accumulate_grad_batches", accumulated, ("conv",))
UNSHUFFLED = Fault("BN203", "a Trainer's loader without shuffle", unshuffled, ("conv",))
THAWED = Fault("BN208", "a Trainer's module that calls train()", thawed, ("mlp",))
SHORT = Fault("BN303", "a Trainer's momentum 0.001", short_run, ("conv", "mlp"), is_cause=True)
AVERAGED = Fault(
    "BN304",
    "a Trainer's averaged weights, statistics left",
    averaged,
    ("conv",),
    False,
    is_cause=True,
)
OTHER = Fault(
    "BN305", "a Trainer's other transform", other_transform, ("conv", "mlp"), False, is_cause=True
)
BAD = Fault("BN401", "a Trainer's bad sample", bad_sample, ("mlp",), is_cause=True)
