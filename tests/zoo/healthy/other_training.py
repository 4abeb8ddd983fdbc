"""Ways to train that the faults do not use."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.architectures import build
from tests.zoo.fault import Healthy
from tests.zoo.healthy.other_networks import settling
from tests.zoo.training import loss_of, pretrained, sgd, train


def cosine(architecture="conv", epochs=6):
    """AdamW with a warm-up and a cosine, as in most recipes."""
    model = build(architecture)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=20),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 37 * epochs - 20),
        ],
        milestones=[20],
    )
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return train(model, optimizer=optimizer, epochs=epochs)


def one_cycle(epochs=4):
    model = build("resnet")
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=37 * epochs + 1)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return train(model, optimizer=optimizer, epochs=epochs)


def clipped():
    model = build("resnet")
    optimizer = sgd(model, lr=0.1)
    optimizer.register_step_pre_hook(
        lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 0.5) and None
    )
    return train(model, optimizer=optimizer, epochs=3)


def smoothed_labels():
    def loss(outputs, images, labels):
        return F.cross_entropy(outputs, labels, label_smoothing=0.1)

    return train(build("conv"), loss=loss)


def mixup():
    mix = {}

    def prepare(images):
        mix["with"] = torch.randperm(len(images))
        mix["share"] = torch.distributions.Beta(0.4, 0.4).sample()
        return torch.lerp(images, images[mix["with"]], mix["share"])

    def loss(outputs, images, labels):
        return torch.lerp(
            F.cross_entropy(outputs, labels),
            F.cross_entropy(outputs, labels[mix["with"]]),
            mix["share"],
        )

    return train(build("conv"), prepare=prepare, loss=loss)


def erased(images):
    """Cut a square out of each image, at a place of its own."""
    rows, columns = torch.randint(0, 6, (2, len(images), 1, 1))
    place = torch.arange(8)
    is_cut = ((place.view(8, 1) - rows - 1).abs() < 2) & ((place - columns - 1).abs() < 2)
    return images.masked_fill(is_cut.unsqueeze(1), 0.0)


def imbalanced(labels):
    """Nine of ten samples are zeros, ones or twos."""
    weights = torch.where(labels < 3, 20.0, 1.0)
    return torch.multinomial(weights, len(labels), replacement=True)


def class_balanced(labels):
    """Draw each batch with as many samples of each class."""
    by_class = [torch.nonzero(labels == digit).flatten() for digit in range(10)]
    shortest = min(map(len, by_class))
    drawn = [places[torch.randperm(len(places))[:shortest]] for places in by_class]
    return torch.stack(drawn, 1).flatten()


def averaged_with_buffers():
    """Evaluate an exponential average of weights and statistics, then train on."""
    model = build("conv")
    average = copy.deepcopy(model).requires_grad_(False)
    own = {}

    def before_step(model, step):
        for mine, theirs in zip(
            average.state_dict().values(), model.state_dict().values(), strict=True
        ):
            if mine.is_floating_point():
                mine.lerp_(theirs, 0.1)
            else:
                mine.copy_(theirs)

    def start_evaluation(model):
        own.update({key: value.clone() for key, value in model.state_dict().items()})
        model.load_state_dict(average.state_dict())
        model.eval()

    def start_epoch(model, epoch):
        if own:
            model.load_state_dict(own)
        model.train()

    return train(
        model, before_step=before_step, start_evaluation=start_evaluation, start_epoch=start_epoch
    )


class SharpnessAware(torch.optim.SGD):
    """Two forwards a step on one batch: at the weights, and uphill of them."""

    @torch.no_grad()
    def climb(self, radius=0.05):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        self.moves = [radius * p.grad / norm for p in parameters]
        for parameter, move in zip(parameters, self.moves, strict=True):
            parameter.add_(move)
        self.zero_grad()

    @torch.no_grad()
    def descend(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter, move in zip(parameters, self.moves, strict=True):
            parameter.sub_(move)


def sharpness_aware():
    model = build("conv")
    optimizer = SharpnessAware(model.parameters(), lr=0.05, momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: optimizer.descend())

    def loss(outputs, images, labels):
        loss_of(outputs, images, labels).backward()
        optimizer.climb()
        return loss_of(model(images), images, labels)

    return train(model, optimizer=optimizer, loss=loss, epochs=3)


def adversarial():
    """Clean and perturbed images as one batch."""
    model = build("conv")

    def prepare(images):
        images = images.clone().requires_grad_()
        model.eval()
        scores = model(images)
        (gradient,) = torch.autograd.grad(scores.logsumexp(1).sum(), images)
        model.train()
        return images.detach() + 0.03 * gradient.sign()

    return train(model, prepare=prepare, epochs=3)


def on_a_canvas():
    """Digits in the middle of a black image, as those of MNIST are."""

    def prepare(images):
        return F.pad(images, (4, 4, 4, 4))

    model = nn.Sequential(*build("conv")[:-2], nn.AdaptiveAvgPool2d(2), nn.Flatten())
    model.append(nn.Linear(128, 10))
    return train(model, prepare=prepare, prepare_evaluation=prepare, epochs=3)


def small_dataset():
    """60 samples and few steps."""
    return train(build("mlp"), samples=60, batch_size=15, epochs=25)


def double_precision():
    def double(images):
        return images.double()

    return train(build("conv").double(), prepare=double, prepare_evaluation=double, epochs=3)


def channels_last():
    model = build("resnet").to(memory_format=torch.channels_last)

    def prepare(images):
        return images.to(memory_format=torch.channels_last)

    return train(model, prepare=prepare, prepare_evaluation=prepare, epochs=2)


def noisy_labels():
    def loss(outputs, images, labels):
        noise = torch.randint(0, 10, labels.shape)
        return F.cross_entropy(outputs, torch.where(torch.rand(len(labels)) < 0.3, noise, labels))

    return train(build("conv"), loss=loss)


def strong_augmentation(images):
    """Contrast, brightness, noise and flips, a draw for each sample."""
    many = (len(images), 1, 1, 1)
    images = images * torch.empty(many).uniform_(0.6, 1.4)
    images = images + torch.empty(many).uniform_(-0.2, 0.2)
    images = torch.where(torch.rand(many) < 0.5, images, images.flip(3))
    return images + 0.1 * torch.randn_like(images)


def one_brightness(images):
    """One brightness for all images of a batch.

    A fault until its harm was measured: accuracy 0.96 to 0.98, as without, and no mode gap.
    """
    return images + torch.empty(1, 1, 1, 1).uniform_(-0.5, 0.5)


def new_head():
    """A head of another size on a trained backbone, with a smaller rate for the backbone."""
    model = pretrained("resnet")
    model[-1] = nn.Linear(128, 10)
    optimizer = torch.optim.SGD(
        [
            {"params": model[:-1].parameters(), "lr": 1e-3},
            {"params": model[-1].parameters(), "lr": 5e-2},
        ],
        momentum=0.9,
    )
    return train(model, optimizer=optimizer, epochs=2)


def distilled():
    """A student learns from a teacher in eval mode."""
    teacher = pretrained("conv").eval()

    def loss(outputs, images, labels):
        with torch.no_grad():
            soft = teacher(images).softmax(1)
        return F.cross_entropy(outputs, soft)

    return train(build("mlp"), loss=loss)


def with_(architecture, **options):
    def run():
        return train(build(architecture), **options)

    return run


OTHER_TRAINING: tuple[Healthy, ...] = (
    Healthy("conv, AdamW, warm-up and cosine", cosine),
    Healthy("mlp, AdamW, warm-up and cosine", lambda: cosine("mlp", 12)),
    Healthy("one cycle up to a rate of 0.3", one_cycle),
    Healthy("clipped gradients", clipped),
    Healthy("smoothed labels", smoothed_labels),
    Healthy("noisy labels", noisy_labels),
    Healthy("mixup", mixup),
    Healthy("random erasing", with_("conv", prepare=erased)),
    Healthy("strong augmentation", with_("conv", prepare=strong_augmentation)),
    *(
        Healthy(f"{name}, one brightness per batch", with_(name, prepare=one_brightness))
        for name in ("conv", "mlp")
    ),
    Healthy("imbalanced classes", settling(lambda: build("conv"), order=imbalanced)),
    Healthy("class-balanced batches", with_("conv", order=class_balanced, batch_size=30)),
    Healthy("average with its buffers", averaged_with_buffers),
    Healthy("sharpness-aware steps", sharpness_aware),
    Healthy("adversarial training", adversarial),
    Healthy("digits on a large dark canvas", on_a_canvas),
    Healthy("60 samples", small_dataset),
    Healthy("float64", double_precision),
    Healthy("channels last", channels_last),
    Healthy("a new head on a trained backbone", new_head),
    Healthy("distilled from a teacher in eval mode", distilled),
)
