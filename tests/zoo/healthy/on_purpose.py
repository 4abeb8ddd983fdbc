"""What looks like a fault and is done on purpose; the cases that DESIGN lists are among them."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

import bnguard
from tests.networks import digits
from tests.zoo.architectures import build
from tests.zoo.fault import Healthy
from tests.zoo.gan import train_gan
from tests.zoo.training import TRAIN, Watched, head, norms, pretrained, sgd, told_of, train


def frozen_backbone():
    """Fine-tune the head over a backbone in eval mode, on other data than it was trained on."""
    model = pretrained("resnet")
    model.requires_grad_(False)
    head(model).requires_grad_(True)

    def start_epoch(model, epoch):
        model.train()
        for layer in norms(model):
            layer.eval()

    def other(images):
        return 1.5 * images - 0.2

    return train(model, start_epoch=start_epoch, prepare=other, prepare_evaluation=other)


def frozen_by_parent(architecture="conv"):
    """Freeze by eval() on the model but for its head, as a linear probe does."""
    model = pretrained(architecture)
    model.requires_grad_(False)
    head(model).requires_grad_(True)
    return train(model, start_epoch=lambda model, epoch: model.eval(), epochs=3)


def eval_with_trainable_affine():
    """Hold BN in eval mode on purpose, and train gamma and beta, as detectors do."""

    def start_epoch(model, epoch):
        model.train()
        for layer in norms(model):
            layer.eval()

    return train(pretrained("conv"), start_epoch=start_epoch, optimizer=None, epochs=3)


def gradual_unfreezing():
    """Freeze the backbone for an epoch, then unfreeze parameters and statistics together."""
    model = pretrained("conv")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    head(model).requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)

    def start_epoch(model, epoch):
        model.train()
        model.requires_grad_(epoch > 0)
        head(model).requires_grad_(True)
        if epoch == 0:
            for layer in norms(model):
                layer.eval()

    return train(model, start_epoch=start_epoch, optimizer=optimizer)


def full_fine_tuning():
    return train(pretrained("resnet"), epochs=3)


def teacher_in_train_mode():
    """A teacher kept in train mode under no_grad, moved by an average of the student."""
    student = build("conv")
    teacher = copy.deepcopy(student).requires_grad_(False)
    images, labels = digits()
    optimizer = sgd(student)
    told = []
    steps = 0
    with bnguard.watch(
        teacher, optimizer=optimizer, every_n_steps=10, on_findings=told.append
    ) as monitor:
        for _ in range(3):
            for batch in torch.randperm(1200).split(32)[:-1]:
                with torch.no_grad():
                    soft = teacher(images[batch]).softmax(1)
                optimizer.zero_grad()
                scores = student(images[batch])
                (F.cross_entropy(scores, labels[batch]) + F.cross_entropy(scores, soft)).backward()
                optimizer.step()
                with torch.no_grad():
                    for mine, theirs in zip(
                        teacher.parameters(), student.parameters(), strict=True
                    ):
                        mine.lerp_(theirs, 0.05)
                monitor.step()
                steps += 1
            teacher.eval()
            with torch.no_grad(), monitor.evaluation():
                teacher(images[1200:])
            teacher.train()
        return Watched(monitor.report(), steps, told_of(told))


def gan(watched, **options):
    def run():
        return train_gan(watched, **options)

    return run


def accumulation():
    return train(build("conv"), batch_size=16, accumulated=4, epochs=6)


def re_estimated():
    """Estimate the statistics anew before each evaluation, as update_bn does."""
    images = digits()[0][TRAIN]

    def start_evaluation(model):
        update_bn(images.split(64), model)
        model.eval()

    return train(build("conv"), start_evaluation=start_evaluation)


def recalibrated():
    """Recalibrate at the end, inside the evaluation."""
    images = digits()[0][TRAIN]

    def start_evaluation(model):
        model.eval()
        bnguard.recalibrate(model, list(images.split(64)), progress=False)

    return train(build("mlp"), start_evaluation=start_evaluation)


def averaged_and_updated():
    """Watch averaged weights whose statistics were estimated for them."""
    model = build("conv")
    averaged = AveragedModel(model)
    images, labels = digits()
    optimizer = sgd(model)
    for batch in torch.randperm(1200).split(32)[:-1]:
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        averaged.update_parameters(model)
    update_bn(images[TRAIN].split(64), averaged)
    return Watched(bnguard.inspect(averaged), 0)


def trained_checkpoint(architecture):
    def run():
        return Watched(bnguard.inspect(pretrained(architecture).state_dict()), 0)

    return run


def half_for_inference():
    """Cast a trained network to float16 to deploy it."""
    return Watched(bnguard.inspect(pretrained("resnet").eval().half()), 0)


ON_PURPOSE: tuple[Healthy, ...] = (
    *(Healthy(f"checkpoint of {name}", trained_checkpoint(name)) for name in ("mlp", "resnet")),
    Healthy("fully frozen backbone, eval mode, other data", frozen_backbone),
    Healthy("linear probe, all in eval mode", frozen_by_parent),
    Healthy("eval mode with trainable affine parameters", eval_with_trainable_affine),
    Healthy("gradual unfreezing", gradual_unfreezing),
    Healthy("full fine-tuning", full_fine_tuning),
    Healthy("teacher in train mode", teacher_in_train_mode),
    Healthy("GAN, discriminator, concatenated", gan("discriminator")),
    Healthy("GAN, generator", gan("generator")),
    Healthy("GAN, generator under no_grad", gan("generator", is_generator_without_grad=True)),
    Healthy("accumulation over batches of 16", accumulation),
    Healthy("statistics re-estimated before evaluation", re_estimated),
    Healthy("recalibrated before evaluation", recalibrated),
    Healthy("averaged weights with their own statistics", averaged_and_updated),
    Healthy("half precision for inference", half_for_inference),
)
