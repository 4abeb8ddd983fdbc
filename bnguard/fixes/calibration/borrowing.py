"""A model on loan to a calibration: prepared for it, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bnguard.fixes.calibration.working import working_statistics
from bnguard.layers import (
    BatchNormLayer,
    as_written,
    preserved_modes,
    preserved_random_state,
)


@contextmanager
def borrowed(model: nn.Module, layers: Sequence[BatchNormLayer]) -> Iterator[None]:
    """Prepare a model for calibration, and give it back as it was.

    It is in eval mode, without gradients, as it was written and not as it was compiled, and its
    layers have statistics that may be written to.
    """
    with (
        preserved_modes(model),
        preserved_random_state(model),
        _preserved_buffers(model),
        _preserved_gradients(model),
        torch.no_grad(),
        as_written(),
        working_statistics(layers),
    ):
        model.eval()
        yield


@contextmanager
def _preserved_buffers(model: nn.Module) -> Iterator[None]:
    """Put back what forwards write to buffers: queues, observers, averages of the user's own."""
    kept = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not _is_expanded(buffer)
    ]
    try:
        yield
    finally:
        for holder, name, buffer, values in kept:
            # .data: a version counter that moved would break a backward that needs the buffer.
            buffer.data.copy_(values)
            holder[name] = buffer


def _is_expanded(buffer: Tensor) -> bool:
    """Return whether elements share a place in memory, so that no forward can write to them."""
    return buffer.layout is torch.strided and any(
        stride == 0 and size > 1 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)
    )


@contextmanager
def _preserved_gradients(model: nn.Module) -> Iterator[None]:
    """Keep gradients out of the reach of forwards that call ``backward``."""
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in kept:
            parameter.grad = gradient
