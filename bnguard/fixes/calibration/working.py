"""Running statistics that a calibration writes to, in place of the model's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bnguard.errors import CalibrationError
from bnguard.layers import BatchNormLayer


@contextmanager
def working_statistics(layers: Sequence[BatchNormLayer]) -> Iterator[None]:
    """Put copies in the place of the running statistics, and the originals back at the end.

    So the model's own tensors are never written to before the result is known to be good. A copy
    starts from finite values, (0, 1) where the original is not, so that poisoned statistics of
    one layer do not hide what another computes.
    """
    originals = [(layer, layer.running_mean, layer.running_var) for layer in layers]
    try:
        for layer, mean, var in originals:
            if mean is not None and var is not None:
                write_statistics(layer, mean.nan_to_num(0.0, 0.0, 0.0), _finite_variance(var))
        yield
    finally:
        for layer, mean, var in originals:
            setattr(layer.module, layer.adapter.mean, mean)
            setattr(layer.module, layer.adapter.var, var)


def write_statistics(layer: BatchNormLayer, mean: Tensor, var: Tensor) -> None:
    """Let a layer normalise with these statistics, through new tensors of its buffers' dtype.

    New tensors and not new values, because a forward that calls autograd may hold the old ones.

    Raises:
        CalibrationError: The dtype cannot hold the values.
    """
    running_mean, running_var = layer.running_mean, layer.running_var
    assert running_mean is not None
    assert running_var is not None
    setattr(layer.module, layer.adapter.mean, fitted(mean, running_mean, layer.name))
    setattr(layer.module, layer.adapter.var, fitted(var, running_var, layer.name))


def fitted(values: Tensor, buffer: Tensor, layer: str) -> Tensor:
    """Return finite values in the dtype and on the device of a buffer.

    Raises:
        CalibrationError: The dtype cannot hold them.
    """
    kept = values.to(device=buffer.device, dtype=buffer.dtype, copy=True)
    if not bool(torch.isfinite(kept).all()):
        largest = values.abs().max().item()
        raise CalibrationError(
            f"{layer}: the statistics reach {largest:.3g}, which its buffers' dtype "
            f"({str(buffer.dtype).removeprefix('torch.')}) cannot hold: keep the BN layers in "
            "float32"
        )
    return kept


def _finite_variance(var: Tensor) -> Tensor:
    return torch.where(torch.isfinite(var) & (var >= 0), var, torch.ones_like(var))
