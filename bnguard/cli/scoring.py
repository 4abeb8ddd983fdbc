"""What a model is worth, by the validation metrics of its own Lightning module."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from bnguard.checkpoint import Checkpoint
from bnguard.cli.devices import lightning_device
from bnguard.lightning.framework import package_name_of
from bnguard.lightning.scoring import TrainerScore

# What is said where there is no score.
NOT_SCORED = "not scored: that takes a validation_step, and validation data"


def trainer_score(
    loader: Iterable[object],
    device: torch.device,
    precision: str,
    metric: str | None,
    checkpoint: Checkpoint,
) -> TrainerScore:
    """Return what scores a Lightning module by the validation loop of its package's Trainer."""
    accelerator, devices = lightning_device(device)
    return TrainerScore(
        loader,
        device=device,
        accelerator=accelerator,
        devices=devices,
        precision=precision,
        metric=metric,
        monitored=checkpoint.monitored,
    )


def has_validation(model: nn.Module) -> bool:
    """Return whether a model is a Lightning module with a validation step of its own."""
    step = getattr(type(model), "validation_step", None)
    is_own = not getattr(step, "__qualname__", "").startswith("LightningModule.")
    return package_name_of(model) is not None and step is not None and is_own


def forward_of(model: nn.Module) -> Callable[[nn.Module, object], object] | None:
    """Return what calls a Lightning module without a forward of its own: its validation step.

    What it returns is then the output of the network inside, of the last part with parameters that
    the step calls. None for every other model, which is called itself.
    """
    has_forward = not type(model).forward.__qualname__.startswith("LightningModule.")
    if has_forward or not has_validation(model):
        return None
    return _validated


def _validated(module: nn.Module, batch: object) -> object:
    outputs: list[object] = []
    handles = [
        part.register_forward_hook(lambda part, args, output: outputs.append(output))
        for part in module.children()
        if any(True for _ in part.parameters())
    ]
    try:
        module.validation_step(batch, 0)  # type: ignore[operator]
    finally:
        for handle in handles:
            handle.remove()
    return outputs[-1] if outputs else None
