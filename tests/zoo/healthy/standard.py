"""Networks, optimizers, batch sizes, learning rates, precision: training as it is usually done."""

from __future__ import annotations

import torch

from tests.zoo.architectures import ARCHITECTURES, build
from tests.zoo.fault import Healthy
from tests.zoo.training import sgd, train


def plain(architecture, **options):
    def run():
        return train(build(architecture), **options)

    return run


def with_optimizer(architecture, make, **options):
    def run():
        model = build(architecture)
        return train(model, optimizer=make(model), **options)

    return run


def with_momentum(architecture, momentum, **options):
    def run():
        return train(build(architecture, momentum=momentum), **options)

    return run


def plain_average(architecture):
    """Average all batches alike, while the weights move slowly.

    At a rate of 0.05 the average lags behind, and the first four evaluations lose 4 to 10 points.
    """

    def run():
        model = build(architecture, momentum=None)
        return train(model, optimizer=sgd(model, 0.01), epochs=8)

    return run


def falling(architecture, lr):
    """Begin with a large learning rate, which falls in each step, as schedules do."""

    def run():
        model = build(architecture)
        optimizer = sgd(model, lr)

        def before_step(model, step):
            optimizer.param_groups[0]["lr"] = lr * (1.0 - step / 222)

        return train(model, optimizer=optimizer, before_step=before_step, epochs=6)

    return run


def augmented(images):
    """Shift by up to a pixel, dim, and add noise, as augmentation does."""
    moved = images.roll(1, 3)
    images = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images, moved)
    dim = torch.empty(len(images), 1, 1, 1).uniform_(0.9, 1.1)
    return images * dim + 0.05 * torch.randn_like(images)


def in_bfloat16(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        return model(images).float()


def adam(model, lr=2e-3):
    return torch.optim.AdamW(model.parameters(), lr=lr)


STANDARD: tuple[Healthy, ...] = (
    *(Healthy(f"{name}, batch 32", plain(name)) for name in ARCHITECTURES),
    *(Healthy(f"{name}, batch 64, 3 epochs", plain(name, batch_size=64)) for name in ARCHITECTURES),
    *(
        Healthy(f"{name}, batch {size}", plain(name, batch_size=size, max_steps=150))
        for name in ("mlp", "conv", "depthwise", "resnet", "sequence", "volumes", "unet")
        for size in (8, 16)
    ),
    *(
        Healthy(f"{name}, batch {size}", plain(name, batch_size=size, epochs=12))
        for name in ("mlp", "conv", "resnet")
        for size in (128, 256)
    ),
    *(
        Healthy(f"{name}, SGD lr {lr}", with_optimizer(name, lambda m, lr=lr: sgd(m, lr)))
        for name in ("mlp", "conv", "resnet")
        for lr in (0.001, 0.01, 0.1)
    ),
    *(
        Healthy(f"{name}, large learning rate {lr} early, then less", falling(name, lr))
        for name in ("mlp", "conv", "resnet")
        for lr in (0.2, 0.4)
    ),
    *(
        Healthy(f"{name}, AdamW", with_optimizer(name, adam))
        for name in ("mlp", "conv", "depthwise", "unet", "volumes", "sequence")
    ),
    *(
        Healthy(
            f"{name}, RMSprop",
            with_optimizer(name, lambda m: torch.optim.RMSprop(m.parameters(), lr=1e-3)),
        )
        for name in ("mlp", "resnet")
    ),
    *(
        Healthy(f"{name}, augmented", plain(name, prepare=augmented))
        for name in ("conv", "mlp", "resnet", "unet", "volumes")
    ),
    *(
        Healthy(f"{name}, bfloat16 autocast", plain(name, forward=in_bfloat16))
        for name in ("conv", "mlp", "resnet")
    ),
    *(
        Healthy(f"{name}, momentum {momentum}", with_momentum(name, momentum, epochs=8))
        for name in ("conv", "mlp")
        for momentum in (0.03, 0.3)
    ),
    *(Healthy(f"{name}, momentum None", plain_average(name)) for name in ("conv", "mlp")),
    Healthy("large learning rate early, few steps", plain("conv", max_steps=40)),
)
