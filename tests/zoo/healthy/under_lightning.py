"""Healthy runs of a real Trainer: its settings, and the callbacks that people use with BN."""

from __future__ import annotations

import torch
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)

from bnguard.lightning import BatchNormRecalibration
from tests.zoo.fault import Healthy
from tests.zoo.trainer import Classifier, fit, trained
from tests.zoo.training import norms


def of(architecture="conv", **options):
    def run():
        return fit(Classifier(architecture), **options)

    return run


class Held(Classifier):
    """Holds the norms of its backbone in eval mode until BackboneFinetuning thaws it."""

    def on_train_epoch_start(self):
        for layer in norms(self.backbone):
            layer.train(self.current_epoch >= 2)

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.05)


def thawing():
    callback = BackboneFinetuning(2, lambda epoch: 1.0, 0.1)
    return fit(trained(Held("conv"), "conv"), callback, max_epochs=5)


def averaged():
    return fit(Classifier("conv"), EMAWeightAveraging(decay=0.9), max_epochs=4)


def stochastic_averaging():
    """Lightning estimates the statistics of the averaged weights at the end."""
    return fit(Classifier("mlp"), StochasticWeightAveraging(0.05, swa_epoch_start=2), max_epochs=4)


def accumulation_that_grows():
    return fit(Classifier("conv"), GradientAccumulationScheduler({0: 1, 2: 4}))


def recalibrated():
    return fit(Classifier("conv"), BatchNormRecalibration(keep="always", strict=True))


class TwoOptimizers(Classifier):
    """Optimizes backbone and head by hand, each with an optimizer of its own."""

    def __init__(self, architecture="conv"):
        super().__init__(architecture)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=2e-3) for part in (self.backbone, self.head)]


UNDER_LIGHTNING: tuple[Healthy, ...] = (
    Healthy("Trainer, conv", of()),
    Healthy("Trainer, resnet", of("resnet", max_epochs=3)),
    Healthy("Trainer, depthwise, batch 16", of("depthwise", batch_size=16, max_epochs=2)),
    Healthy("Trainer, mlp, batch 128", of("mlp", batch_size=128, max_epochs=10)),
    Healthy("Trainer, bfloat16", of("mlp", precision="bf16-mixed")),
    Healthy("Trainer, clipped gradients", of(gradient_clip_val=0.5)),
    Healthy("Trainer, accumulation over batches of 32", of(accumulate_grad_batches=2)),
    Healthy("Trainer, validated twice an epoch", of(val_check_interval=0.5, max_epochs=3)),
    Healthy("Trainer, two optimizers by hand", lambda: fit(TwoOptimizers())),
    Healthy("Trainer, accumulation that grows", accumulation_that_grows),
    Healthy("Trainer, a backbone held in eval mode, then thawed", thawing),
    Healthy("Trainer, EMA with its buffers", averaged),
    Healthy("Trainer, stochastic weight averaging", stochastic_averaging),
    Healthy("Trainer, recalibrated before validation", recalibrated),
)
