"""What a command computes with: the device, the samples, and the score of a Lightning module."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from bnguard.cli.request import Request
from bnguard.errors import ConfigurationError
from bnguard.lightning.framework import package_name_of
from bnguard.lightning.scoring import TrainerScore
from bnguard.recalibration.batches import can_draw, load_samples, shuffle_indices

NOT_SCORED = "not scored: that needs a validation_step of Lightning, and validation data"


@dataclass(frozen=True)
class SampleSplit:
    """The samples that calibrate, and those that score, if there are any; both may be the same."""

    calibration: Iterable[object]
    scoring: Iterable[object] | None
    is_shared: bool


def split_samples(loader: Iterable[object], samples: int, holdout: float | None) -> SampleSplit:
    """Return the samples of one split, divided between calibration and scoring.

    ``samples`` calibrate at most. The share ``holdout`` scores and does not calibrate; by default
    that is what ``samples`` leaves, or the whole split if nothing is left.
    """
    if not can_draw(loader):
        if holdout is not None:
            raise ConfigurationError(
                "--holdout needs a DataLoader over a data set with a length; leave it out"
            )
        return SampleSplit(loader, loader, is_shared=True)
    order = shuffle_indices(len(loader.dataset))  # type: ignore[arg-type]
    total = len(order)
    number = min(samples, total)
    if holdout is not None:
        number = min(number, total - math.ceil(holdout * total))
    if number == total:
        return SampleSplit(loader, loader, is_shared=True)
    return SampleSplit(
        load_samples(loader, order[:number]), load_samples(loader, order[number:]), is_shared=False
    )


def validation_score(
    request: Request, model: nn.Module, loader: Iterable[object] | None, device: torch.device
) -> TrainerScore | None:
    """Return the score of a Lightning module by the validation loop of its package's Trainer.

    It is None without a validation step or data for it.
    """
    values = request.values
    if loader is None or not has_validation(model):
        for option in ("metric", "expected"):
            if values.get(option) is not None:
                raise ConfigurationError(
                    f"--{option} needs a LightningModule with a validation_step, and a data module "
                    "with validation data"
                )
        return None
    accelerator, devices = lightning_device(device)
    return TrainerScore(
        loader,
        device=device,
        accelerator=accelerator,
        devices=devices,
        precision=values.get("precision", "32-true"),
        metric=values.metric,
        monitored=request.checkpoint.monitored,
    )


def has_validation(model: nn.Module) -> bool:
    """Return whether a model is a Lightning module with a validation step of its own."""
    step = getattr(type(model), "validation_step", None)
    is_own = not getattr(step, "__qualname__", "").startswith("LightningModule.")
    return package_name_of(model) is not None and step is not None and is_own


def forward_of(model: nn.Module) -> Callable[[nn.Module, object], object] | None:
    """Return a forward for a Lightning module without one: its validation step.

    It returns the output of the last child with parameters that the step calls. None for every
    other model, which is called itself.
    """
    has_forward = not type(model).forward.__qualname__.startswith("LightningModule.")
    return None if has_forward or not has_validation(model) else _run_validation_step


def _run_validation_step(module: nn.Module, batch: object) -> object:
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


def usable_device(name: str) -> torch.device:
    """Return the device of this name, of torch or Lightning.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        # Lightning's name for a GPU of any maker.
        any_gpu = "mps" if torch.backends.mps.is_available() else "cuda"
        device = torch.device(any_gpu if name == "gpu" else name)
        torch.empty(0, device=device)
    # torch without CUDA raises AssertionError, a backend without kernels NotImplementedError.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigurationError(
            f"--device {name} cannot be used here ({reason}): use cpu"
        ) from error
    if device.type == "meta":
        raise ConfigurationError("--device meta computes no values: use cpu")
    return device


def lightning_device(device: torch.device) -> tuple[str, list[int] | int]:
    """Return ``accelerator`` and ``devices``, as Lightning's classes take them.

    >>> lightning_device(torch.device("cuda:1")), lightning_device(torch.device("cpu"))
    (('gpu', [1]), ('cpu', 1))
    """
    if device.type == "cuda":
        return "gpu", [device.index or 0]
    return device.type, 1
