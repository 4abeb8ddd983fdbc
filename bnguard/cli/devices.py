"""Devices, as a command line names them."""

from __future__ import annotations

import torch

from bnguard.errors import ConfigurationError

# What Lightning calls a GPU, whosever it is.
_ANY_GPU = "gpu"


def usable_device(name: str) -> torch.device:
    """Return the device that is named as torch names it, or as Lightning does.

    Raises:
        ConfigurationError: There is none of this name here.

    >>> usable_device("cpu")
    device(type='cpu')
    """
    try:
        device = torch.device(_first_gpu() if name == _ANY_GPU else name)
        torch.empty(0, device=device)
    # A torch built without CUDA asserts, and a backend without a kernel implements nothing.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigurationError(
            f"--device {name} cannot be used here ({reason}): use cpu"
        ) from error
    if device.type == "meta":
        raise ConfigurationError("--device meta computes nothing: use cpu")
    return device


def lightning_device(device: torch.device) -> tuple[str, list[int] | int]:
    """Return ``accelerator`` and ``devices``, as Lightning's classes take them.

    >>> lightning_device(torch.device("cuda:1")), lightning_device(torch.device("cpu"))
    (('gpu', [1]), ('cpu', 1))
    """
    if device.type == "cuda":
        return "gpu", [device.index or 0]
    return device.type, 1


def _first_gpu() -> str:
    return "mps" if torch.backends.mps.is_available() else "cuda"
