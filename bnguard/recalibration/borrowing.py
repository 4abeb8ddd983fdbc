"""A model on loan to a calibration: prepared for it, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from bnguard.layers.bn_layer import (
    BatchNormLayer,
    as_written,
    preserved_buffers,
    preserved_modes,
    preserved_random_state,
)
from bnguard.recalibration.statistics import working_statistics


@contextmanager
def borrowed(model: nn.Module, layers: Sequence[BatchNormLayer]) -> Iterator[None]:
    """Prepare a model for calibration, and give it back as it was.

    It is in eval mode, without gradients, as it was written and not as it was compiled, and its
    layers have statistics that may be written to.
    """
    with (
        preserved_modes(model),
        preserved_random_state(model),
        preserved_buffers(model),
        _preserved_gradients(model),
        torch.no_grad(),
        as_written(),
        working_statistics(layers),
    ):
        model.eval()
        yield


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
