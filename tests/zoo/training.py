"""The training loop that faults and healthy runs share, with the places where they differ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import bnguard
from bnguard.findings import FindingGroup, Severity
from bnguard.report import Report
from tests.networks import digits

TRAIN, EVALUATE = slice(0, 1200), slice(1200, None)


@dataclass(frozen=True)
class Told:
    """That a rule named something, and at which step; 0 before training."""

    code: str
    severity: Severity
    step: int


@dataclass(frozen=True)
class Watched:
    """What was said of one run: at its end, and while it went on."""

    report: Report
    steps: int
    told: tuple[Told, ...] = ()

    @property
    def everything(self) -> tuple[Told, ...]:
        """What was told at any time; a finding may have gone by the end."""
        at_end = (Told(f.code, f.severity, f.step or 0) for f in self.report.findings)
        return (*self.told, *at_end)

    def first_step(self, code: str, severity: Severity) -> int | None:
        """Return the step at which a finding was named first; None where it never was."""
        steps = [t.step for t in self.everything if t.code == code and t.severity >= severity]
        return min(steps, default=None)

    @property
    def accusations(self) -> tuple[str, ...]:
        """The codes of all warnings and errors that were named, at whatever time."""
        return tuple(sorted({t.code for t in self.everything if t.severity > Severity.INFO}))


def told_of(groups: Iterable[FindingGroup]) -> tuple[Told, ...]:
    """Return what ``on_findings`` was called with."""
    worst = (group.worst for group in groups)
    return tuple(Told(f.code, f.severity, f.step or 0) for f in worst)


def never(*_arguments):
    """Change nothing."""


def unchanged(images):
    return images


def shuffled(labels):
    return torch.randperm(len(labels))


def sgd(model, lr=0.05):
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(trainable, lr=lr, momentum=0.9)


def loss_of(outputs, images, labels):
    """Return the loss: of classes, or of ink and paper where the outputs are images."""
    if outputs.dim() == 4:
        return F.cross_entropy(outputs, (images[:, 0] > 0.3).long())
    return F.cross_entropy(outputs, labels)


def train(
    model,
    *,
    batch_size=32,
    epochs=4,
    max_steps=None,
    optimizer=None,
    order=shuffled,
    drop_last=True,
    prepare=unchanged,
    prepare_evaluation=unchanged,
    start_epoch=None,
    start_evaluation=None,
    before_step=never,
    forward=None,
    samples=1200,
    accumulated=1,
    loss=loss_of,
    **options,
):
    """Train on digits, evaluate after each epoch, and return what bnguard says at the end.

    ``order`` gives the samples of an epoch, ``prepare`` a batch; ``start_epoch`` sets the modes,
    ``start_evaluation`` those of the evaluation.
    """
    images, labels = digits()
    start_epoch = start_epoch or (lambda model, epoch: model.train())
    start_evaluation = start_evaluation or (lambda model: model.eval())
    forward = forward or (lambda model, batch: model(batch))
    optimizer = optimizer or sgd(model)
    step = 0
    per_epoch = -(-samples // batch_size) if not drop_last else samples // batch_size
    planned = max_steps or epochs * (per_epoch // accumulated)
    told = []
    monitor = bnguard.watch(
        model,
        optimizer=optimizer,
        every_n_steps=10,
        max_overhead=0.0,  # what is found must not depend on the clock
        planned_steps=planned,
        accumulated_batches=accumulated,
        on_findings=told.append,
        **options,
    )
    with monitor:
        for epoch in range(epochs):
            start_epoch(model, epoch)
            chosen = order(labels[:samples])
            for number, batch in enumerate(chosen.split(batch_size)):
                if len(batch) < batch_size and drop_last:
                    continue
                inputs = prepare(images[batch])
                before_step(model, step)
                value = loss(forward(model, inputs), inputs, labels[batch]) / accumulated
                if value.isfinite():
                    value.backward()
                if (number + 1) % accumulated:
                    continue
                optimizer.step()
                optimizer.zero_grad()
                monitor.step()
                step += 1
                if step == max_steps:
                    break
            start_evaluation(model)
            with torch.no_grad(), monitor.evaluation():
                for part in images[EVALUATE].split(128):
                    model(prepare_evaluation(part))
            if step == max_steps:
                break
        return Watched(monitor.report(), step, told_of(told))


def pretrained(architecture, epochs=2, **options):
    """Return a network that was trained, unwatched."""
    from tests.zoo.architectures import build

    model = build(architecture, **options)
    images, labels = digits()
    optimizer = sgd(model)
    for _ in range(epochs):
        for batch in torch.randperm(1200).split(32):
            optimizer.zero_grad()
            loss_of(model(images[batch]), images[batch], labels[batch]).backward()
            optimizer.step()
    return model


def norms(model):
    """Return the BN layers of a model."""
    return [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def head(model):
    """Return the last layer with weights."""
    return [m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))][-1]
