"""Running statistics that a calibration writes to, in place of the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bnguard.errors import CalibrationError
from bnguard.layers.bn_layer import BatchNormLayer


@contextmanager
def working_statistics(layers: Sequence[BatchNormLayer]) -> Iterator[None]:
    """Put copies in the place of the running statistics, and the originals back at the end.

    So the model's own tensors are never written to before the result is known to be good. A copy
    starts from finite values, (0, 1) where the original is not, so that poisoned statistics of
    one layer do not hide what another computes.
    """
    with _statistics_put_back(layers):
        for layer in layers:
            mean, var = current_statistics(layer)
            is_good = torch.isfinite(mean) & torch.isfinite(var) & (var >= 0)
            write_statistics(
                layer,
                torch.where(is_good, mean, torch.zeros_like(mean)),
                torch.where(is_good, var, torch.ones_like(var)),
            )
        yield


@contextmanager
def changed_statistics(layer: BatchNormLayer) -> Iterator[None]:
    """Give a layer other statistics for a while, each channel others."""
    mean, var = current_statistics(layer)
    # Not all in proportion: a later normalisation would take that out again.
    factors = torch.rand(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean) + 0.5
    with _statistics_put_back([layer]):
        write_statistics(layer, mean - factors * var.sqrt(), var * factors)
        yield


def current_statistics(layer: BatchNormLayer) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance of a layer that has them, each of shape ``(C,)``."""
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    return mean.detach(), var.detach()


def write_statistics(layer: BatchNormLayer, mean: Tensor, var: Tensor) -> None:
    """Let a layer normalise with these statistics, through new tensors of its buffers' dtype.

    New tensors and not new values, because a forward that calls autograd may hold the old ones.

    Raises:
        CalibrationError: The dtype cannot hold the values.
    """
    (holder, mean_key), (_, var_key), *_ = layer.statistics()
    for key, values in ((mean_key, mean), (var_key, var)):
        holder[key] = fitted(values, holder[key], layer.name)


def fitted(values: Tensor, buffer: Tensor, layer: str) -> Tensor:
    """Return finite values in the dtype and shape, and on the device, of a buffer.

    Raises:
        CalibrationError: The dtype cannot hold them.
    """
    kept = values.to(device=buffer.device, dtype=buffer.dtype, copy=True).view(buffer.shape)
    if not bool(torch.isfinite(kept).all()):
        is_wide = torch.finfo(buffer.dtype).max >= torch.finfo(torch.float32).max
        raise CalibrationError(
            f"{layer}: the statistics reach {values.abs().max().item():.3g}, which its buffers "
            f"cannot hold in {str(buffer.dtype).removeprefix('torch.')}: "
            + (
                "the weights before it have blown up: go back to an earlier checkpoint"
                if is_wide
                else "keep BN layers in float32"
            )
        )
    return kept


@contextmanager
def _statistics_put_back(layers: Sequence[BatchNormLayer]) -> Iterator[None]:
    kept = [(holder, key, holder[key]) for layer in layers for holder, key in layer.statistics()]
    try:
        yield
    finally:
        for holder, key, tensor in kept:
            holder[key] = tensor
